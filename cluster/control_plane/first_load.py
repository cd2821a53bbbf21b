"""Lets the workers of a new cluster load, all at once, and notes how far they are. Places nothing."""

import time
from collections.abc import Callable
from concurrent.futures import wait

from cluster.control_plane.members import Members
from cluster.handle import PROGRESS_INTERVAL_S, results, settled
from cluster.planning.placement import Placement
from cluster.worker import HostAddress, LoadProgress, Role


def load_all(
    members: Members, placement: Placement, deadline: float, note: Callable[[LoadProgress], None]
) -> dict[str, HostAddress]:
    """Load attention weights and placed experts; return where each host listens. Raises the first failure."""
    experts = members.of(Role.EXPERT)
    loads = {worker: worker.call("load") for worker in members.followers}
    loads |= {worker: worker.call("load", placement.held_by(worker.worker)) for worker in experts}
    while not settled(loads, PROGRESS_INTERVAL_S) and time.monotonic() < deadline:
        asked = [worker.call("progress") for worker, load in loads.items() if not load.done()]
        for answer in wait(asked, timeout=PROGRESS_INTERVAL_S).done:
            if answer.exception() is None:
                note(answer.result())
    addresses = results(loads, deadline, doing="load")
    return {worker.worker: addresses[worker.worker] for worker in experts}
