"""Makes one unbroken stream of the several that a generation may take; pure.

A stream that breaks is resumed, on any gateway, after the tokens that were received. Where the request is not known any
more it is repeated from its start with the seed that was in use: the same tokens come again, and are left out.
"""

import copy
import uuid
from collections import defaultdict
from dataclasses import dataclass, field, replace

from llama4_dist.client.results import Assembler, Delta, Event, delta_of
from llama4_dist.client.retry import Attempts, is_lost, may_retry
from llama4_dist.errors import DuplicateRequestError, EngineError, Llama4Error, NotFoundError
from llama4_dist.request import Sampling
from llama4_dist.v1 import inference_pb2

StreamMessage = inference_pb2.StreamGenerateRequest | inference_pb2.StreamChatRequest


@dataclass(slots=True, kw_only=True)
class Received:
    """What has come of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    num_chars: int = 0

    @property
    def text(self) -> str:
        """All of it, joined once."""
        if len(self.texts) > 1:
            self.texts = ["".join(self.texts)]
        return self.texts[0] if self.texts else ""


class Progress:
    """The request to send next, and of each event what its reader has not been given."""

    def __init__(self, message: StreamMessage, sampling: Sampling | None, attempts: Attempts) -> None:
        self.message = message
        self.assembler = Assembler(sampling)
        self._attempts = attempts
        self._num_sequences = message.request.sampling.num_sequences or 1
        self._seed: int | None = None  # None until the request has begun
        self._received: defaultdict[int, Received] = defaultdict(Received)  # of the request in hand
        self._given: dict[int, Received] = {}  # by requests before it
        self._finished: set[int] = set()

    @property
    def seed(self) -> int | None:
        return self._seed

    def feed(self, event: Event) -> Delta | None:
        """Take an event; return what is new in it."""
        if event.HasField("started") and self._seed is None:
            self._seed = event.started.seed
            self.assembler.begin(event.started)
        if event.HasField("usage"):
            self.assembler.end(event.usage)
        delta = delta_of(event)
        if delta is None:
            return None
        new = self._finish(delta) if delta.finish_reason is not None else self._new(delta)
        if new is not None:
            self.assembler.add(new)
            self._attempts.progressed()
        return new

    def after(self, error: Llama4Error) -> float:
        """Prepare the next attempt after a failure and return the wait before it, or raise."""
        if self._seed is None:
            return self._attempts.delay_after(error, retriable=may_retry(error))
        if self.message.HasField("resume") and isinstance(error, (NotFoundError, DuplicateRequestError)):
            self._repeat(self._seed)  # the failure that led to the resume has been counted
            return 0.0
        delay_s = self._attempts.delay_after(error, retriable=may_retry(error))
        if is_lost(error):
            self._resume()
        return delay_s

    def _resume(self) -> None:
        self.message = copy.deepcopy(self.message)
        counts = [len(self._received[index].token_ids) for index in range(self._num_sequences)]
        self.message.resume.next_token_index[:] = counts

    def _repeat(self, seed: int) -> None:
        self.message = copy.deepcopy(self.message)
        self.message.ClearField("resume")
        self.message.request.sampling.seed = seed
        # With another seed field it is another body: the id may still be known to some worker.
        self.message.request.request_id = uuid.uuid4().hex
        for index, received in self._received.items():
            given = self._given.get(index)
            if given is None or len(received.token_ids) > len(given.token_ids):
                self._given[index] = received
        self._received = defaultdict(Received)

    def _new(self, delta: Delta) -> Delta | None:
        """Return the part of a delta that earlier requests have not given; raise EngineError if they gave another."""
        received, given = self._received[delta.index], self._given.get(delta.index, Received())
        begin, begin_char = len(received.token_ids), received.num_chars
        received.token_ids += delta.token_ids
        received.texts.append(delta.text)
        received.num_chars += len(delta.text)
        old = given.token_ids[begin : begin + len(delta.token_ids)]
        old_text = given.text[begin_char : begin_char + len(delta.text)]
        if list(delta.token_ids[: len(old)]) != old or delta.text[: len(old_text)] != old_text:
            raise diverged(delta.index)
        new = replace(
            delta,
            token_ids=delta.token_ids[len(old) :],
            text=delta.text[len(old_text) :],
            logprobs=delta.logprobs[len(old) :],
        )
        return new if new.token_ids or new.text else None

    def _finish(self, delta: Delta) -> Delta | None:
        received, given = self._received[delta.index], self._given.get(delta.index, Received())
        if len(received.token_ids) < len(given.token_ids) or received.num_chars < given.num_chars:
            raise diverged(delta.index)
        if delta.index in self._finished:
            return None
        self._finished.add(delta.index)
        return delta


def diverged(index: int) -> EngineError:
    """Build the error of a request that did not repeat itself."""
    return EngineError(
        f"sequence {index} was generated again and came out different: the gateways serve different models or defaults",
        reason="REPEAT_DIVERGED",
    )
