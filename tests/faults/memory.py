"""A memory limit by control group (version 1) that ends in a kill by the kernel; knows no other limit."""

import contextlib
import os
import secrets
from pathlib import Path

from llama4_dist.chaos.faults.processes import Process
from tests.faults.fault import Fault, FaultNotVerified, FaultUnavailable, must

ROOT = Path("/sys/fs/cgroup/memory")


class MemoryLimit(Fault):
    """Moves a process into a group of its own that may take `num_bytes` more than nothing; old pages stay uncounted."""

    def __init__(self, pid: int, *, num_bytes: int, aim: int | None = None) -> None:
        self.target = Process.of(pid)
        self.num_bytes = num_bytes
        self._aim = Process.of(aim) if aim is not None else self.target
        self._home = group_of(self._aim.pid)
        self.group = self._home / f"llama4-{secrets.token_hex(4)}"
        try:
            self.group.mkdir()
            self.group.rmdir()
        except OSError as error:
            raise FaultUnavailable(f"no memory group can be made below {self._home}: {error.strerror}") from error

    def inject(self) -> None:
        self.group.mkdir()
        (self.group / "memory.limit_in_bytes").write_text(str(self.num_bytes))
        (self.group / "cgroup.procs").write_text(str(self._aim.pid))

    def verify(self) -> None:
        limit = int((group_of(self.target.pid) / "memory.limit_in_bytes").read_text())
        if not limit <= self.num_bytes:
            raise FaultNotVerified(f"process {self.target.pid} may take {limit} bytes, not {self.num_bytes}")

    def verify_killed(self, timeout_s: float = 10.0) -> None:
        """Wait for the kernel to kill the process for what it took."""
        must(lambda: self.target.is_dead, f"process {self.target.pid} was killed", timeout_s=timeout_s)
        counts = dict(line.split() for line in (self.group / "memory.oom_control").read_text().splitlines())
        if not int(counts["oom_kill"]):
            raise FaultNotVerified(f"process {self.target.pid} died, but not for its memory: {counts}")

    def heal(self) -> None:
        if self.group.exists():
            with contextlib.suppress(OSError):  # a dead process cannot be moved, and has left by itself
                (self._home / "cgroup.procs").write_text(str(self._aim.pid))
            must(self._is_removed, f"{self.group} is empty and removed")

    def verify_healed(self) -> None:
        if self.group.exists() or (not self.target.is_dead and group_of(self.target.pid) == self.group):
            raise FaultNotVerified(f"process {self.target.pid} is still limited by {self.group}")

    def _is_removed(self) -> bool:
        try:
            self.group.rmdir()
        except OSError:
            return False
        return True


def group_of(pid: int) -> Path:
    """Return the folder of a process's memory group."""
    if not os.access(ROOT / "cgroup.procs", os.W_OK):
        raise FaultUnavailable(f"{ROOT} (control groups, version 1) is not there or not writable")
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return ROOT / path.lstrip("/")
    raise FaultUnavailable(f"process {pid} is in no memory group of version 1")
