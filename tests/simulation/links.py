"""Links between simulated processes: each posting is a moment at which something may happen. Decides nothing."""

from typing import TYPE_CHECKING

from torch import Tensor

from llama4_dist.dispatch.links.inproc import Faults, InprocLink
from llama4_dist.dispatch.links.link import FrameHeader, LinkLimits
from tests.simulation.clock import Clock

if TYPE_CHECKING:
    from tests.simulation.expert_process import SimHost

LIMITS = LinkLimits(max_rows=8, credit=4)


class WorkersEnd(InprocLink):
    """An attention worker's end; to post is a moment, and to poll runs the host."""

    def __init__(self, host: "SimHost", clock: Clock, faults: Faults | None) -> None:
        super().__init__(host.name, host.incarnation, LIMITS, clock, faults)
        self.host = host
        self.drive = host.drive

    def post(self, header: FrameHeader, rows_ND: Tensor | None) -> None:
        self.host.world.point("dispatching", self.host)
        super().post(header, rows_ND)


class HostsEnd(InprocLink):
    """A host's end. What a host says after it was stopped leaves it when it goes on."""

    def __init__(self, host: "SimHost", worker: str, incarnation: int, clock: Clock, faults: Faults | None) -> None:
        super().__init__(worker, incarnation, LIMITS, clock, faults)
        self.host = host
        self._held_back: list[tuple[FrameHeader, Tensor | None]] = []
        self.lossy = faults is not None and faults.drop > 0
        self._usual_faults = faults

    def post(self, header: FrameHeader, rows_ND: Tensor | None) -> None:
        if self.host.stopped:
            self._held_back.append((header, None if rows_ND is None else rows_ND.clone()))
        else:
            self.host.world.clock.wake()
            super().post(header, rows_ND)

    def go_on(self) -> None:
        """Send what was held back; into a link that is down meanwhile it is lost."""
        held_back, self._held_back = self._held_back, []
        for header, rows_ND in held_back:
            if not (self._down or self.other._down):
                super().post(header, rows_ND)

    def slow_down(self, delay_s: float) -> None:
        """Let every answer be late; 0 = as usual."""
        self._faults = Faults(delay=1.0, delay_s=delay_s) if delay_s else self._usual_faults

    def heal(self) -> None:
        """Lose and delay nothing from now on, in both directions."""
        self._faults = self._usual_faults = self.other._faults = None
        self.lossy = False

    @property
    def num_waiting(self) -> int:
        """Frames that came and were not taken, and answers held back."""
        return len(self._inbox) + len(self._held_back)


def join(
    host: "SimHost", worker: str, incarnation: int, to_host: Faults | None, to_worker: Faults | None
) -> WorkersEnd:
    """Return the worker's end of a new link; the host serves the other one."""
    clock = host.world.clock
    workers_end = WorkersEnd(host, clock, to_host)
    hosts_end = HostsEnd(host, worker, incarnation, clock, to_worker)
    workers_end.other, hosts_end.other = hosts_end, workers_end
    host.serve(hosts_end)
    return workers_end
