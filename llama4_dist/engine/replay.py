"""What a group remembers of a running request, and how its next output is taken; plain data, no thread, no engine call.

A draw depends on (seed, position) alone, so a request that goes on elsewhere after its emitted tokens draws the same.
"""

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from llama4_dist.engine.port import Engine
from llama4_dist.errors import DuplicateRequestError, Llama4Error, OverloadedError, UnavailableError
from llama4_dist.request import EngineRequest, FinishReason, TokenOutput

# What an engine says that is gone or going; the request did nothing wrong.
LOST_REASONS = frozenset({"WORKER_LOST", "DRAINING"})
# Engines a request may lose in a row without one new token: it may be what kills them.
MAX_FRUITLESS = 8


@dataclass(eq=False, slots=True, kw_only=True)
class Member:
    """An engine of a group and the requests it has; `lost_s` is when it last gave a request up that it had."""

    name: str
    engine: Engine
    num_live: int = 0
    lost_s: float | None = None


class Fate(Enum):
    """What becomes of a request with an output."""

    GO_ON = auto()  # pass the output on
    REPLAY = auto()  # its engine is lost: go on with another one
    ELSEWHERE = auto()  # its engine would not take it: another one may


@dataclass(eq=False, slots=True, kw_only=True)
class LiveRequest:
    """A request between `submit` and its last output. `member` None means that no engine has it now.

    `asked` are engines that have yet to answer an attach, `full` those that refused before the first token, `left` the
    engine that had it before: should that still run, it must let go.
    """

    request: EngineRequest
    submitted_s: float
    member: Member | None = None
    asked: set[Member] = field(default_factory=set)
    full: set[Member] = field(default_factory=set)
    left: Member | None = None
    refusal: Llama4Error | None = None
    token_ids: list[int] = field(default_factory=list)
    begun: bool = False
    cancelled: bool = False
    num_replays: int = 0
    num_fruitless: int = 0
    waits_since_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def fate(self, output: TokenOutput) -> Fate:
        """Decide by an output's error whether the request goes on."""
        error = output.error
        if isinstance(error, UnavailableError) and error.reason in LOST_REASONS:
            return Fate.REPLAY if self.num_fruitless < MAX_FRUITLESS else Fate.GO_ON
        full = isinstance(error, OverloadedError) and error.reason == OverloadedError.reason
        # Taken once, it is not refused any more; a worker may still hold what a lost gateway submitted.
        taken = self.num_replays > 0
        if (full and not self.begun) or (taken and (full or isinstance(error, DuplicateRequestError))):
            return Fate.ELSEWHERE
        return Fate.GO_ON

    def leave(self, fate: Fate, error: Llama4Error | None, now_s: float) -> None:
        """Note that its engine does not have it any more."""
        if fate is Fate.REPLAY:
            self.num_replays += 1
            self.num_fruitless += 1
            self.left = self.member
        elif self.member is not None:
            self.full.add(self.member)
        self.refusal = error
        self.member = None
        if self.waits_since_s is None:
            self.waits_since_s = now_s

    def take(self, output: TokenOutput) -> TokenOutput:
        """Note an output that is passed on; return it without what was said before."""
        if output.token_ids:
            self.token_ids += output.token_ids
            self.num_fruitless = 0
            self.waits_since_s = None
            self.full.clear()
        repeated = self.begun and (output.queue_s is not None or output.prompt_logprobs is not None)
        self.begun = self.begun or output.error is None
        return replace(output, queue_s=None, prompt_logprobs=None) if repeated else output

    def remaining_s(self, now_s: float) -> float | None:
        """Return the time it still has."""
        timeout_s = self.request.timeout_s
        return None if timeout_s is None else timeout_s - (now_s - self.submitted_s)

    def continuation(self, now_s: float) -> EngineRequest:
        """Return the request as another engine must be given it."""
        if not self.num_replays and not self.full:
            return self.request
        return replace(
            self.request,
            output_token_ids=(*self.request.output_token_ids, *self.token_ids),
            timeout_s=self.remaining_s(now_s),
        )

    def end(self, *, finish: FinishReason | None = None, error: Llama4Error | None = None) -> TokenOutput:
        """Build its last output."""
        return TokenOutput(request_id=self.request_id, finish_reason=finish, error=error)
