"""Network namespaces as nodes: made, entered for a socket, removed; knows no route between them."""

import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.faults.fault import FaultUnavailable

CLONE_NEWNET = 0x40000000  # sched.h; os.setns came with Python 3.12
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One namespace and the address it is reached by."""

    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs `words` on this node."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def inside(self, action: Callable[[], Answer]) -> Answer:
        """Run an action in a thread that is on this node; the sockets it makes stay there."""
        answers: list[Answer] = []
        failures: list[BaseException] = []

        def enter_and_run() -> None:
            try:
                with Path(f"/run/netns/{self.namespace}").open() as handle:
                    if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")
                answers.append(action())
            except BaseException as failure:  # noqa: BLE001  raised below, where the caller is
                failures.append(failure)

        thread = threading.Thread(target=enter_and_run, name=f"in {self.namespace}")
        thread.start()
        thread.join()
        for failure in failures:
            raise failure
        return answers[0]


def make_namespace(purpose: str) -> str:
    """Make a namespace with a working loopback and return its name; raise FaultUnavailable where that is impossible."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise FaultUnavailable("network namespaces need root and iproute2")
    name = f"l4-{purpose}-{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        raise FaultUnavailable(f"this kernel permits no network namespace: {error.stderr.strip()}") from error
    ip("-n", name, "link", "set", "lo", "up")
    return name


def remove_namespace(name: str) -> None:
    """Remove a namespace and all interfaces in it."""
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=30)


def ip(*words: str) -> str:
    """Run iproute2's `ip`."""
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
    return done.stdout
