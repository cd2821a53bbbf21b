"""A process that gets only a share of a processor; knows it by pid."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from llama4_dist.chaos.faults.fault import Fault, FaultNotVerified, must
from llama4_dist.chaos.faults.processes import Process

DUTY_CYCLE = Path(__file__).with_name("duty_cycle.py")
SAMPLES = 100
SAMPLE_S = 0.0057  # no divisor of the period, so that the samples do not march in step with it


class CpuLimit(Fault):
    """A straggler: a helper process lets it run for `share` of every period and stops it for the rest."""

    def __init__(self, pid: int, *, share: float, period_s: float = 0.02, aim: int | None = None) -> None:
        if not 0.01 <= share <= 0.9:
            raise ValueError(f"{share=} of a processor: choose from 0.01 to 0.9")
        self.target = Process.of(pid)
        self.share = share
        self._period_s = period_s
        self._aim = Process.of(aim) if aim is not None else self.target
        self._helper: subprocess.Popen[bytes] | None = None

    def inject(self) -> None:
        numbers = (str(self._aim.pid), str(self.share), str(self._period_s), str(os.getpid()))
        self._helper = subprocess.Popen([sys.executable, "-S", str(DUTY_CYCLE), *numbers])
        helper = self._helper
        must(lambda: self._aim.state == "T" or helper.poll() is not None, "the helper has begun", timeout_s=10.0)

    def verify(self) -> None:
        """Measure: stopped about as often as asked, and no more processor time than its share and half again."""
        stopped, used = self.measure()
        if stopped < (1 - self.share) * 0.6 or used > self.share * 1.5 + 0.1:
            raise FaultNotVerified(
                f"process {self.target.pid} was stopped {stopped:.0%} of the time and used {used:.0%} of a processor,"
                f" with {self.share=}"
            )

    def heal(self) -> None:
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
            self._helper = None
            self._aim.send(signal.SIGCONT)

    def verify_healed(self) -> None:
        stopped, _ = self.measure()
        if self.target.is_dead or stopped:
            raise FaultNotVerified(f"process {self.target.pid} is dead or still stopped {stopped:.0%} of the time")

    def measure(self) -> tuple[float, float]:
        """Return (share of samples in which it was stopped, processors used), over about half a second."""
        begun_s, begun_cpu_s, stopped = time.monotonic(), self.target.cpu_s, 0
        for _ in range(SAMPLES):
            stopped += self.target.state == "T"
            time.sleep(SAMPLE_S)
        return stopped / SAMPLES, (self.target.cpu_s - begun_cpu_s) / (time.monotonic() - begun_s)
