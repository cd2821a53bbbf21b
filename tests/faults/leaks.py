"""What a test leaves behind: processes, threads, descriptors, shared memory, files, actors; lists them, ends none."""

import fnmatch
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

POLL_S = 0.05
PREFIXES = ("llama4-", "llama4_dist", "l4-")
# Pools that libraries start on first use and keep: they grow to a bound, once a process.
LAZY_POOLS = (
    "thread grpc*",
    "thread event_engine*",
    "thread resolver-exec*",
    "thread default-exec*",
    "thread timer_m*",
)


class Leaked(AssertionError):
    """Something is left that was not there before; the message lists it by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Names of what there is, with how often: a reconnected socket is the same, a second one is not."""

    found: Counter[str]
    pids: frozenset[int]  # whose threads and descriptors are compared; of a new process its name says enough


def snapshot() -> Snapshot:
    """Take stock of this process and its descendants, and of what they keep outside of themselves."""
    own = psutil.Process()
    processes = [own, *own.children(recursive=True)]
    found: Counter[str] = Counter()
    for process in processes:
        found.update(in_process(process, is_own=process.pid == own.pid))
    found.update(f"shared memory {path}" for path in ours(Path("/dev/shm")))
    found.update(f"temporary {path}" for path in ours(Path(tempfile.gettempdir())) if path.name.startswith(PREFIXES))
    found.update(in_ray())
    return Snapshot(found=found, pids=frozenset(one.pid for one in processes))


def assert_no_leaks(
    before: Snapshot, after: Snapshot | None = None, *, grace_s: float = 5.0, ignore: Sequence[str] = LAZY_POOLS
) -> None:
    """Raise Leaked unless all that is new since `before` goes within `grace_s`; `ignore` holds patterns of names.

    Without `after` it looks anew until the grace is over; with it, that moment decides.
    """
    deadline_s = time.monotonic() + grace_s
    while left := new_since(before, after or snapshot(), ignore):
        if after is not None or time.monotonic() > deadline_s:
            raise Leaked(f"left behind after {grace_s} s:\n  " + "\n  ".join(left))
        time.sleep(POLL_S)


def new_since(before: Snapshot, after: Snapshot, ignore: Iterable[str] = ()) -> list[str]:
    """List what is there now and was not before, with the number where it is more than one."""
    patterns = tuple(ignore)
    left = []
    for name, count in sorted((after.found - before.found).items()):
        plain, _, pid = name.rpartition(" of ")
        is_inside_new = bool(plain) and pid.isdigit() and int(pid) not in before.pids
        if not is_inside_new and not any(fnmatch.fnmatch(plain or name, pattern) for pattern in patterns):
            left.append(f"{name} x{count}" if count > 1 else name)
    return left


def in_process(process: psutil.Process, *, is_own: bool) -> Iterable[str]:
    """Name a process, its threads and its descriptors; nothing if it ends meanwhile."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return [f"zombie {process.name()} {process.pid}"]
        command = " ".join(" ".join(process.cmdline()).split())[:120]
        names = [] if is_own else [f"process {process.pid} {command}"]
        names += [f"thread {name} of {process.pid}" for name in thread_names(process.pid, is_own=is_own)]
        return names + [f"{kind} of {process.pid}" for kind in descriptors(process.pid)]
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return []


def thread_names(pid: int, *, is_own: bool) -> list[str]:
    """Name threads as Python does, where it knows them, else as the kernel does."""
    known = {one.native_id: one.name for one in threading.enumerate()} if is_own else {}
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            names.append(known.get(int(task.name)) or (task / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return names


def descriptors(pid: int) -> list[str]:
    """Name what descriptors lead to: sockets with their state, pipes and others by kind, files by path."""
    sockets = {one.fd: described(one) for one in psutil.Process(pid).net_connections(kind="all")}
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except (FileNotFoundError, ProcessLookupError):
            continue  # such as the one that lists this folder
        if target.startswith(f"/proc/{pid}/"):
            continue
        names.append("descriptor " + (sockets.get(int(link.name)) or re.sub(r":\[\d+\]", "", target)))
    return names


def described(one: Any) -> str:
    """Name a socket: where it listens, else its kind and state, since a port of a connection is a new one each time."""
    where = f" at {one.laddr}" if one.status == psutil.CONN_LISTEN or one.family == socket.AF_UNIX else ""
    return f"socket {one.family.name} {one.type.name} {one.status}{where}"


def ours(folder: Path) -> list[Path]:
    """List entries of a shared folder that belong to this user."""
    found = []
    for path in folder.iterdir():
        try:
            if path.lstat().st_uid == os.geteuid():
                found.append(path)
        except FileNotFoundError:
            continue
    return found


def in_ray() -> list[str]:
    """Name living actors and placement groups, if this process is connected to a Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return []
    from ray._private import state  # ray.util.state asks the dashboard, which we do not run
    from ray.util import placement_group_table

    actors = [one for one in state.actors().values() if one["State"] != "DEAD"]
    groups = [one for one in placement_group_table().values() if one["state"] != "REMOVED"]
    return [
        *(f"Ray actor {one['ActorClassName']} {one['Name'] or one['ActorID']}" for one in actors),
        *(f"placement group {one['name'] or one['placement_group_id']} {one['state']}" for one in groups),
    ]
