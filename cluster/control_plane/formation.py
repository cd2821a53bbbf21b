"""Decides whether an attention group has to be formed, and as which formation; pure."""

from collections.abc import Mapping

from cluster.plan import Group
from cluster.worker import Formation, StageAddress, WorkerStatus


def due_formation(group: Group, statuses: Mapping[str, WorkerStatus], *, last: int) -> int | None:
    """Return the number of the formation that is due: above `last`, the highest known, and all that anybody was told.

    None while one of the group does not answer, and where all of them are in the same formation.
    """
    if not all(worker in statuses for worker in group.all):
        return None
    own = [statuses[worker] for worker in group.all]
    formations = {status.formation for status in own}
    if len(formations) == 1 and formations != {0}:
        return None
    return 1 + max(last, *(status.last_formation for status in own))


def formation_of(group: Group, number: int, addresses: Mapping[str, StageAddress]) -> Formation:
    """Put a formation together from what its processes said when they were prepared.

    Pages are as many as the leader counts, or as the member has room for that has least.
    """
    members = tuple(addresses[worker] for worker in group.members)
    leader = addresses[group.leader]
    return Formation(
        group=group.leader,
        number=number,
        num_pages=leader.num_pages or min(one.num_pages for one in members),
        leader=leader,
        members=members,
    )
