"""A contender in a process of its own, asked over a pipe. It stands still while another one is asked."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders.answering import Timed

ROOT = Path(__file__).resolve().parents[2]
TAIL = 30  # lines of its log shown when it fails


class Contender:
    """One engine. Stopped by signal between its turns, so that no thread of it spins meanwhile."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], *, log: Path, threads: int, python: str = sys.executable
    ) -> None:
        self.name = name
        self._log = log
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as log_file:
            self._process = subprocess.Popen(
                [python, "-m", f"benchmarks.contenders.{module}", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                env=environment,
                cwd=ROOT,
                start_new_session=True,  # a group of its own, to be stopped with all its children
            )
        self.pid = self._process.pid
        self.version = str(self._read()["version"])
        self._signal(signal.SIGSTOP)

    def ask(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Timed:
        """Run one call while every other contender stands still; 1 token means: time the prefill."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None, "started with a pipe"
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        answered = self._read()
        self._signal(signal.SIGSTOP)
        if "error" in answered:
            raise SystemExit(f"{self.name} failed: {answered['error']}\n{self._log_tail()}")
        return Timed(**answered)

    def close(self) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "started with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}\n{self._log_tail()}")
        return dict(json.loads(line))

    def _signal(self, number: int) -> None:
        os.killpg(self.pid, number)

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-TAIL:])
