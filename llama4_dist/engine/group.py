"""Several engines behind one port: each request goes to one that knows its start, or has least to do; no transport.

Engines come and go. What one of them had when it was lost goes on with another; the caller sees neither gap nor error.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from llama4_dist.engine.live_requests import LiveRequests
from llama4_dist.engine.port import Engine, EngineStats, OnOutputs
from llama4_dist.engine.prefix_router import PrefixRouter
from llama4_dist.engine.replay import LiveRequest, Member
from llama4_dist.engine.replayer import Replayer
from llama4_dist.engine.snapshot import add_stats
from llama4_dist.errors import DuplicateRequestError, OverloadedError, UnavailableError
from llama4_dist.request import EngineLimits, EngineRequest

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineGroup:
    """`Engine` over engines of the same model, which it owns from then on.

    A request stays with the engine that took it while that lives. `replay_timeout_s` bounds how long a request waits
    while no engine is left; then it ends with UnavailableError.
    """

    def __init__(self, engines: Sequence[Engine], *, names: Sequence[str] = (), replay_timeout_s: float = 30.0) -> None:
        if not engines:
            raise ValueError("a group needs at least one engine")
        self._requests = LiveRequests(lock=threading.Condition(threading.RLock()), clock=time.monotonic)
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._num_named = 0
        self._started = False
        self._limits = engines[0].limits
        self._router = PrefixRouter()
        self._replayer = Replayer(
            self._requests,
            members=self._by_load,
            order=self._by_prefix,
            placed=lambda request, member: self._router.note(request, member.name),
            timeout_s=replay_timeout_s,
        )
        given: Sequence[str | None] = names or [None] * len(engines)
        for engine, name in zip(engines, given, strict=True):
            self.add(engine, name=name)

    @property
    def limits(self) -> EngineLimits:
        """Return the limits of the engine with the smallest context: what any of them takes."""
        return self._limits

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the engines of now."""
        with self._lock:
            return tuple(self._members)

    def add(self, engine: Engine, *, name: str | None = None) -> str:
        """Let an engine serve from now on, first of all what waits; return its name."""
        with self._lock:
            name = name or f"engine-{self._num_named}"
            if name in self._members:
                raise ValueError(f"an engine {name!r} is in the group: remove it before another takes its name")
            self._num_named += 1
            member = self._members[name] = Member(name=name, engine=engine)
            self._limits = self._smallest_limits()
            started = self._started
        if started:
            self._start(member)
        log.info("engine_added engine=%s", name)
        return name

    def remove(self, name: str) -> None:
        """Close an engine; its requests go on with the others."""
        with self._lock:
            member = self._members.pop(name, None)
            if member is None:
                raise ValueError(f"no engine {name!r} is in the group; it has {', '.join(self._members) or 'none'}")
            if self._members:
                self._limits = self._smallest_limits()
        self._router.forget(name)
        left = self._requests.leave(member)
        log.info("engine_removed engine=%s requests=%d", name, len(left))
        for request_id in left:
            member.engine.abort(request_id)
        member.engine.close()

    def start(self, on_outputs: OnOutputs) -> None:
        """Start every engine; `on_outputs` is never called by two at once."""
        self._replayer.start(on_outputs)
        with self._lock:
            self._started = True
            members = tuple(self._members.values())
        for member in members:
            self._start(member)

    def submit(self, request: EngineRequest) -> None:
        """Give the request to the engine that knows its start, or the least loaded; passed over if down or full."""
        self._replayer.submit(self._register(request))

    def attach(self, request: EngineRequest) -> None:
        """Ask every engine for a request without an owner; NotFoundError comes as an output if none has it."""
        self._replayer.attach(self._register(request))

    def abort(self, request_id: str) -> None:
        """Cancel a request, wherever it runs or waits."""
        member = self._requests.cancel(request_id)
        if member is not None:
            member.engine.abort(request_id)

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        """Score on the least loaded engine that can."""
        return self._try_each(lambda engine: engine.score(token_ids, chunk_size=chunk_size))

    def stats(self) -> EngineStats:
        """Return sums over the engines that answer; the queue age is the largest. UnavailableError if none does."""
        answers: list[EngineStats] = []
        refusal = UnavailableError("no engine is in the group")
        for member in self._by_load():
            try:
                answers.append(member.engine.stats())
            except UnavailableError as error:
                refusal = error
        if not answers:
            raise refusal
        total = add_stats(answers)
        return replace(total, requests_replayed=total.requests_replayed + self._replayer.replayed.total())

    def stats_by_worker(self) -> Mapping[str, EngineStats | None]:
        """Return each engine's counters; None for one that does not answer."""
        answers: dict[str, EngineStats | None] = {}
        for member in self._by_load():
            try:
                answers[member.name] = member.engine.stats()
            except UnavailableError:
                answers[member.name] = None
        return answers

    def replays(self) -> Mapping[str, int]:
        """Requests that went on elsewhere, by the engine they had before, since this group was made."""
        return dict(self._replayer.replayed)

    def close(self) -> None:
        """Close every engine, also when closing one of them fails; what still runs ends as they say."""
        with ExitStack() as stack:
            stack.callback(self._replayer.close)
            for member in self._by_load():
                stack.callback(member.engine.close)
            self._requests.wake(replays=False)

    def _start(self, member: Member) -> None:
        member.engine.start(partial(self._replayer.take, member))
        self._requests.wake()

    def _register(self, request: EngineRequest) -> LiveRequest:
        sampling = request.sampling
        if sampling.seed is None:  # two engines must draw alike
            sampling = replace(sampling, seed=secrets.randbits(64))
        # A request that comes back to an engine which still runs it is known by its digest.
        request = replace(request, sampling=sampling, digest=request.digest or secrets.token_bytes(16))
        live = LiveRequest(request=request, submitted_s=time.monotonic())
        if not self._requests.register(live):
            raise DuplicateRequestError(f"request {request.request_id} is running: choose another id")
        return live

    def _by_load(self) -> list[Member]:
        with self._lock:
            return sorted(self._members.values(), key=lambda member: member.num_live)

    def _by_prefix(self, request: EngineRequest) -> list[Member]:
        with self._lock:
            members = dict(self._members)
        order = self._router.order(request, {name: member.num_live for name, member in members.items()})
        return [members[name] for name in order]

    def _smallest_limits(self) -> EngineLimits:
        limits = (member.engine.limits for member in self._members.values())
        return min(limits, key=lambda one: one.max_context)

    def _try_each(self, act: Callable[[Engine], T]) -> T:
        refusal = UnavailableError("no engine is in the group")
        for member in self._by_load():
            try:
                return act(member.engine)
            except (UnavailableError, OverloadedError) as error:
                log.debug("engine_passed_over engine=%s reason=%s", member.name, error.reason)
                refusal = error if isinstance(error, UnavailableError) else refusal
        raise refusal
