"""Brings one process together with the others of its group: dials, and waits for those that dial it."""

import socket
from collections.abc import Mapping

from llama4_dist.stages.links.dial import Target, dial
from llama4_dist.stages.links.door import Door
from llama4_dist.stages.links.meeting import Meeting, Place


def meet(door: Door, meeting: Meeting, dials: Mapping[Place, Target], *, deadline: float) -> dict[Place, socket.socket]:
    """Return a connection for each place to dial and each that is expected, or leave none behind.

    Raises HandshakeError with a reason where another process does not fit, WORKER_LOST where one does not come.
    """
    door.meeting = meeting
    dialled: dict[Place, socket.socket] = {}
    try:
        for place, target in dials.items():
            dialled[place] = dial(target, meeting, place[0], secret=door.secret, deadline=deadline)
        return dialled | meeting.wait(deadline)
    except BaseException:
        for connection in dialled.values():
            connection.close()
        raise
    finally:
        meeting.end()
        door.meeting = None
