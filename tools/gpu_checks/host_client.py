"""Starts `host_process` and speaks to it; what it writes to its standard error comes out here."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90.0  # its first answer comes when its kernels are compiled


class HostProcess:
    """One child. `ask` sends a command, `answer` waits for what it says; several may be asked before one is heard."""

    def __init__(self, *arguments: str) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.name = " ".join(arguments[:2])
        self._child = subprocess.Popen(
            [sys.executable, "-m", "gpu_checks.host_process", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._heard = b""

    def ask(self, *command: Any) -> None:
        assert self._child.stdin is not None, "it has a pipe"
        self._child.stdin.write(json.dumps(command).encode() + b"\n")
        self._child.stdin.flush()

    def answer(self) -> Any:
        """Return what it says to the oldest question; RuntimeError if it ends or takes too long."""
        assert self._child.stdout is not None, "it has a pipe"
        descriptor, until_s = self._child.stdout.fileno(), time.monotonic() + PATIENCE_S
        while b"\n" not in self._heard:
            if not select.select([descriptor], [], [], max(0.0, until_s - time.monotonic()))[0]:
                raise RuntimeError(f"host process {self.name!r} said nothing for {PATIENCE_S:.0f} s")
            more = os.read(descriptor, 1 << 16)
            if not more:
                raise RuntimeError(f"host process {self.name!r} ended with {self._child.wait(10)}; see above")
            self._heard += more
        line, self._heard = self._heard.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """End it by ending its input."""
        assert self._child.stdin is not None, "it has a pipe"
        assert self._child.stdout is not None, "it has a pipe"
        self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
