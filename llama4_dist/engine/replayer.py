"""Keeps a group's requests running: gives them to engines, hands their outputs on, moves them when one is lost.

Knows no membership: it is told which engines there are. A thread of its own places what has lost its engine.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeGuard

from llama4_dist.engine.live_requests import LiveRequests
from llama4_dist.engine.port import OnOutputs
from llama4_dist.engine.replay import LiveRequest, Member
from llama4_dist.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    EngineError,
    Llama4Error,
    OverloadedError,
    UnavailableError,
)
from llama4_dist.request import EngineRequest, FinishReason, TokenOutput
from llama4_dist.telemetry.tracing import active, is_sampled, ours

log = logging.getLogger(__name__)

AVOIDED_S = 10.0  # as long as a process takes to start


class Replayer:
    """Calls engines and the listener, neither of them under the lock of `requests`.

    `members` are all engines, `order` those to ask for a request, the best first, and `placed` is told who took it. A
    request waits `timeout_s` at most for one.
    """

    def __init__(
        self,
        requests: LiveRequests,
        *,
        members: Callable[[], list[Member]],
        order: Callable[[EngineRequest], list[Member]],
        placed: Callable[[EngineRequest, Member], None],
        timeout_s: float,
    ) -> None:
        self.replayed: Counter[str] = Counter()  # by the name of the engine that was lost
        self._requests = requests
        self._members = members
        self._order = order
        self._took = placed
        self._timeout_s = timeout_s
        self._emitting = threading.Lock()  # held from the taking of an output to its delivery, so that none overtakes
        self._on_outputs: OnOutputs = lambda outputs: None
        self._thread = threading.Thread(target=self._run, name="engine-group", daemon=True)

    def start(self, on_outputs: OnOutputs) -> None:
        """Begin to place requests; `on_outputs` is never called by two threads at once."""
        self._on_outputs = on_outputs
        self._thread.start()

    def submit(self, live: LiveRequest) -> None:
        """Give a new request to an engine, or forget it and raise."""
        try:
            refusal = self._offer(live)
            if refusal is not None:
                raise refusal
        except BaseException:
            self._requests.forget(live)
            raise

    def attach(self, live: LiveRequest) -> None:
        """Ask all engines for a request that runs on one of them without an owner."""
        members = self._members()
        self._requests.ask(live, members)
        for member in members:
            try:
                member.engine.attach(live.request)
            except (UnavailableError, DuplicateRequestError):
                self._requests.deny(live, member)

    def take(self, member: Member, outputs: Sequence[TokenOutput]) -> None:
        """Pass an engine's outputs on, but for those of requests that it has not, or that go on elsewhere."""
        with self._emitting:
            passed = self._requests.judge(member, outputs)
            if passed:
                self._on_outputs(passed)

    def close(self) -> None:
        """End the thread."""
        self._requests.wake(stop=True)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _offer(self, live: LiveRequest) -> Llama4Error | None:
        """Give a request to the first engine in order that takes it; return why none did."""
        refusal: Llama4Error = UnavailableError("no engine is in the group")
        request, left, since_s = live.continuation(time.monotonic()), live.left, live.waits_since_s
        # An engine that lost its model's group takes requests and lets them wait: one that computes is better.
        for member in sorted(self._order(request), key=lambda one: was_lost(one, time.monotonic())):
            if member in live.full and not live.num_replays:
                continue
            self._requests.own(live, member)
            try:
                member.engine.submit(request)
            except BaseException as error:
                waits = not self._requests.disown(live, member)
                if not is_refusal(error, live):
                    raise
                if waits:
                    return None
                log.debug("engine_passed_over engine=%s cause=%s", member.name, type(error).__name__)
                # A full queue says more than a dead engine: coming back later helps.
                if not isinstance(refusal, OverloadedError):
                    refusal = error
                continue
            self._took(request, member)
            self._placed(live, member, left)
            if left is not None:
                record_replay(live, left, member, since_s)
            return None
        return refusal

    def _placed(self, live: LiveRequest, member: Member, left: Member | None) -> None:
        with self._requests.lock:
            if left is not None:
                self.replayed[left.name] += 1
                live.left = None if live.left is left else live.left
                log.info("request_replayed id=%s from=%s to=%s", live.request_id, left.name, member.name)
            cancelled = live.cancelled
        if left is not None and left is not member:
            left.engine.abort(live.request_id)  # should it only have been cut off
        if cancelled:
            member.engine.abort(live.request_id)

    def _run(self) -> None:
        stopped = False
        while not stopped:
            work = self._requests.next_work()
            stopped = work.stopped
            try:
                for act in work.chores:
                    act()
                for live in work.waiting:
                    self._place(live)
                self._say_last_words()
            except Exception:
                log.exception("replay_failed")

    def _place(self, live: LiveRequest) -> None:
        """Give a waiting request to an engine, end it if it has waited enough, or let it wait on."""
        end = self._overdue(live)
        if end is None:
            try:
                refusal = self._offer(live)
            except Exception as error:
                log.exception("replay_failed id=%s", live.request_id)
                refusal = EngineError(f"the request could not go on elsewhere: {type(error).__name__}")
            if refusal is None:
                return
            if not live.num_replays:
                end = live.end(error=live.refusal)
            elif not is_refusal(refusal, live):
                end = live.end(error=refusal)
        if end is not None:
            self._requests.end(live, end)
        else:
            self._requests.let_wait(live)

    def _overdue(self, live: LiveRequest) -> TokenOutput | None:
        """Return the last output of a request that is not to be given to an engine any more."""
        now_s = time.monotonic()
        remaining_s = live.remaining_s(now_s)
        if live.cancelled:
            return live.end(finish=FinishReason.CANCELLED)
        if not self._requests.replays:
            return live.end(error=UnavailableError("the engines are shutting down", reason="DRAINING"))
        if remaining_s is not None and remaining_s <= 0:
            message = f"the deadline of {live.request.timeout_s} s passed while no worker was left; raise timeout"
            return live.end(error=DeadlineExceededError(message))
        if live.waits_since_s is not None and now_s - live.waits_since_s >= self._timeout_s:
            message = f"the attention worker was lost, and none took over in {self._timeout_s:g} s: retry the request"
            return live.end(error=UnavailableError(message, reason="WORKER_LOST", retry_after_s=1.0))
        return None

    def _say_last_words(self) -> None:
        with self._emitting:
            words = self._requests.last_words()
            if words:
                self._on_outputs(words)


def record_replay(live: LiveRequest, left: Member, member: Member, since_s: float | None) -> None:
    """Record how long a traced request was without an engine, and which ones they were."""
    tracing, now_s = active(), time.monotonic()
    if tracing is None or not is_sampled(live.request.trace):
        return
    said = ours(**{"from": left.name, "to": member.name, "replays": live.num_replays})
    tracing.record("replay", live.request.trace, (now_s if since_s is None else since_s, now_s), said)


def was_lost(member: Member, now_s: float) -> bool:
    """Tell whether an engine gave a request up a moment ago; then any other is asked first."""
    return member.lost_s is not None and now_s - member.lost_s < AVOIDED_S


def is_refusal(error: BaseException, live: LiveRequest) -> TypeGuard[Llama4Error]:
    """Tell whether another engine, or the same one later, may take what this one would not."""
    if isinstance(error, OverloadedError):
        return not live.num_replays or error.reason == OverloadedError.reason
    return isinstance(error, UnavailableError) or (live.num_replays > 0 and isinstance(error, DuplicateRequestError))
