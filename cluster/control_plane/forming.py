"""Forms attention groups: whenever somebody of one is new, or says that it was lost. Starts and finds nobody.

A process that does not leave its old group in time is dismissed, so that another takes its place.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from cluster.control_plane.formation import due_formation, formation_of
from cluster.control_plane.members import Members
from cluster.plan import Group
from cluster.worker import WorkerStatus
from llama4_dist.errors import HandshakeError, Llama4Error, UnavailableError

if TYPE_CHECKING:
    from cluster.control_plane.controller import Controller

log = logging.getLogger(__name__)

PREPARE_TIMEOUT_S = 40.0  # for the part under way to end
FORM_TIMEOUT_S = 40.0  # longer than processes wait for each other
SERVE_TIMEOUT_S = 60.0
FIRST_PAUSE_S = 0.5  # between tries that fail
LONGEST_PAUSE_S = 15.0
HOPELESS = frozenset({"MEMBER_STUCK", "TIMEOUT"})


class FormingError(UnavailableError):
    """A group could not be formed; `hopeless` are those of it that cannot be asked again."""

    reason = "GROUP_NOT_FORMED"

    def __init__(self, message: str, hopeless: Collection[str]) -> None:
        super().__init__(message)
        self.hopeless = frozenset(hopeless)


def form(members: Members, group: Group, number: int) -> None:
    """Have all processes of a group leave the formation before and meet as the next one.

    Raises HandshakeError where one does not fit the others, FormingError otherwise.
    """
    handles = members.named(group.all)
    if missing := sorted(set(group.all) - {handle.worker for handle in handles}):
        raise FormingError(f"{', '.join(missing)} died while {group.leader} was formed", ())
    addresses, failures = members.try_each(handles, "prepare", number, timeout_s=PREPARE_TIMEOUT_S)
    _raise_any(group, number, failures)
    formation = formation_of(group, number, addresses)
    _, failures = members.try_each(handles, "form", formation, timeout_s=FORM_TIMEOUT_S)
    _raise_any(group, number, failures)


def _raise_any(group: Group, number: int, failures: Mapping[str, Llama4Error]) -> None:
    if not failures:
        return
    for error in failures.values():
        if isinstance(error, HandshakeError):
            raise error
    causes = "; ".join(f"{worker}: {error.message}" for worker, error in sorted(failures.items()))
    hopeless = [worker for worker, error in failures.items() if error.reason in HOPELESS]
    raise FormingError(f"formation {number} of {group.leader} failed: {causes}", hopeless)


class Forming:
    """Which groups are being formed, each in a thread of its own, and when to try again where that failed."""

    def __init__(self, controller: "Controller", clock: Callable[[], float]) -> None:
        self._controller = controller
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way: set[str] = set()
        self._last: dict[str, int] = {}  # the highest number given to each group
        self._pauses_s: dict[str, float] = {}
        self._not_before_s: dict[str, float] = {}

    def look(self, statuses: Mapping[str, WorkerStatus]) -> None:
        """Begin to form the groups that have to be, given what their processes said just now."""
        for group in self._controller.groups:
            name = group.leader
            with self._lock:
                if name in self._under_way or self._clock() < self._not_before_s.get(name, 0.0):
                    continue
                number = due_formation(group, statuses, last=self._last.get(name, 0))
                if number is None:
                    continue
                self._last[name] = number
                self._under_way.add(name)
            is_serving = bool(statuses[name].addresses)
            threading.Thread(
                target=self._run, args=(group, number, is_serving), name=f"form-{name}", daemon=True
            ).start()

    def _run(self, group: Group, number: int, is_serving: bool) -> None:
        failed = True
        members = self._controller.members
        log.info("group_forming group=%s formation=%d", group.leader, number)
        try:
            form(members, group, number)
            if not is_serving:  # the watch learns where
                deadline = time.monotonic() + SERVE_TIMEOUT_S
                members.ask(members.named([group.leader]), "serve", deadline=deadline)
            failed = False
            log.info("group_formed group=%s formation=%d", group.leader, number)
        except FormingError as error:
            log.warning("group_not_formed group=%s formation=%d cause=%s", group.leader, number, error)
            self._controller.dismiss(members.named(error.hopeless))
        except Exception as error:  # the next look at the workers tries again
            is_defect = not isinstance(error, Llama4Error)
            log.error("group_not_formed group=%s cause=%s", group.leader, error, exc_info=is_defect)
        finally:
            with self._lock:
                pause_s = self._pauses_s.get(group.leader, FIRST_PAUSE_S) if failed else 0.0
                self._pauses_s[group.leader] = min(LONGEST_PAUSE_S, 2 * pause_s) if failed else FIRST_PAUSE_S
                self._not_before_s[group.leader] = self._clock() + pause_s
                self._under_way.discard(group.leader)
