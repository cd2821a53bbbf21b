"""The running requests of a group: which engine has each, what waits for one, which outputs count; calls no engine."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from llama4_dist.engine.port import is_last, unknown_request
from llama4_dist.engine.replay import Fate, LiveRequest, Member
from llama4_dist.errors import Llama4Error
from llama4_dist.request import FinishReason, TokenOutput

RETRY_S = 0.02  # between two looks for an engine while requests wait for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the placing thread has to do: calls that must not be made under the lock, and requests without an engine."""

    chores: Sequence[Callable[[], None]]
    waiting: Sequence[LiveRequest]
    stopped: bool


@dataclass(eq=False, slots=True, kw_only=True)
class LiveRequests:
    """Every output passes `judge`, so an engine that a request has left cannot say anything of it any more."""

    lock: threading.Condition
    clock: Callable[[], float]
    replays: bool = True
    _live: dict[str, LiveRequest] = field(default_factory=dict)
    _waiting: deque[LiveRequest] = field(default_factory=deque)
    _last_words: list[TokenOutput] = field(default_factory=list)
    _chores: list[Callable[[], None]] = field(default_factory=list)
    _changed: bool = False
    _stopped: bool = False

    def register(self, live: LiveRequest) -> bool:
        """Take an id; False if it is taken."""
        with self.lock:
            return self._live.setdefault(live.request_id, live) is live

    def forget(self, live: LiveRequest) -> None:
        """Free the id of a request that was never taken."""
        with self.lock:
            if self._live.get(live.request_id) is live:
                self._drop(live)

    def own(self, live: LiveRequest, member: Member) -> None:
        """Note that an engine has the request; before it is submitted there, for its first output may come at once."""
        with self.lock:
            live.member = member
            member.num_live += 1

    def disown(self, live: LiveRequest, member: Member) -> bool:
        """Take `own` back; False if the request has been taken from the engine already, and waits for another."""
        with self.lock:
            if live.member is not member:
                return False
            live.member = None
            member.num_live -= 1
            return True

    def ask(self, live: LiveRequest, members: Sequence[Member]) -> None:
        """Note which engines are asked for a request; the first that has it keeps it."""
        with self.lock:
            live.asked.update(members)
            if not members:
                self.end(live, live.end(error=unknown_request()))

    def deny(self, live: LiveRequest, member: Member) -> None:
        """Note that an engine does not have what all were asked for."""
        with self.lock:
            live.asked.discard(member)
            if not live.asked and live.member is None:
                self.end(live, live.end(error=unknown_request()))

    def cancel(self, request_id: str) -> Member | None:
        """Mark a request as cancelled; return the engine that must be told."""
        with self.lock:
            live = self._live.get(request_id)
            if live is None:
                return None
            live.cancelled = True
            if live.member is None and live.asked:
                self._chores += [partial(asked.engine.abort, request_id) for asked in live.asked]
                self.end(live, live.end(finish=FinishReason.CANCELLED))
            self.wake()
            return live.member

    def leave(self, member: Member) -> list[str]:
        """Take all requests from an engine; return their ids."""
        with self.lock:
            left = [live for live in self._live.values() if live.member is member]
            for live in left:
                self._park(live, Fate.REPLAY, None)
            for live in [live for live in self._live.values() if member in live.asked]:
                self.deny(live, member)
            return [live.request_id for live in left]

    def judge(self, member: Member, outputs: Sequence[TokenOutput]) -> list[TokenOutput]:
        """Return those of an engine's outputs that the listener is to hear."""
        with self.lock:
            return [kept for output in outputs if (kept := self._judge(member, output)) is not None]

    def end(self, live: LiveRequest, output: TokenOutput) -> None:
        """Have the placing thread say a last output of our own."""
        with self.lock:
            if self._live.get(live.request_id) is live:
                self._drop(live)
                self._last_words.append(output)
                self.wake()

    def let_wait(self, live: LiveRequest) -> None:
        """Put a request back that found no engine."""
        with self.lock:
            self._waiting.append(live)

    def last_words(self) -> list[TokenOutput]:
        """Take the outputs of our own that are to be said."""
        with self.lock:
            words, self._last_words = self._last_words, []
            return words

    def next_work(self) -> Work:
        """Wait until there is something to do, or to be tried again."""
        with self.lock:
            self.lock.wait_for(lambda: self._changed or self._stopped, RETRY_S if self._waiting else None)
            self._changed = False
            work = Work(chores=self._chores, waiting=self._waiting, stopped=self._stopped)
            self._chores, self._waiting = [], deque()
            return work

    def wake(self, *, stop: bool = False, replays: bool | None = None) -> None:
        """Have the placing thread look again; with `stop` for the last time."""
        with self.lock:
            self._changed = True
            self._stopped = self._stopped or stop
            self.replays = self.replays if replays is None else replays
            self.lock.notify_all()

    def _judge(self, member: Member, output: TokenOutput) -> TokenOutput | None:
        live = self._live.get(output.request_id)
        if live is None:
            return None
        if live.member is None and member in live.asked:
            if output.error is not None:
                self.deny(live, member)
                return None
            live.asked.clear()
            self.own(live, member)
        if live.member is not member:
            if output.attached_tokens is not None:  # a second engine has it: one is enough
                self._chores.append(partial(member.engine.abort, output.request_id))
                self.wake()
            return None
        fate = live.fate(output)
        if fate is not Fate.GO_ON and self.replays:
            self._park(live, fate, output.error)
            return None
        if is_last(output):
            self._drop(live)
        return live.take(output)

    def _park(self, live: LiveRequest, fate: Fate, error: Llama4Error | None) -> None:
        if live.member is not None:
            live.member.num_live -= 1
            if fate is Fate.REPLAY:
                live.member.lost_s = self.clock()
        live.leave(fate, error, self.clock())
        self._waiting.append(live)
        self.wake()

    def _drop(self, live: LiveRequest) -> None:
        del self._live[live.request_id]
        if live.member is not None:
            live.member.num_live -= 1
