"""Times requests on an engine from their outputs: the engine's own thread says when each token came."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby

from benchmarks.contenders.answering import Prompts, Timed
from llama4_dist.engine.port import Engine
from llama4_dist.request import EngineRequest, Sampling, TokenOutput

TIMEOUT_S = 600


class EngineTimer:
    """Runs batches of greedy requests, one batch at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._events: list[tuple[float, TokenOutput]] = []
        self._num_tokens: Counter[str] = Counter()  # by request
        self._num_ended = 0
        self._error: Exception | None = None
        self._round = 0
        engine.start(self._collect)

    def prefill(self, prompt: Sequence[int]) -> Timed:
        """Time a prompt from its submission to the first token."""
        started = time.perf_counter()
        self._submit([prompt], [1])
        self._wait(lambda: self._num_ended == 1)
        return Timed(seconds=self._events[-1][0] - started, num_tokens=len(prompt), token_ids=self._tokens([prompt], 1))

    def decode(self, prompts: Prompts, num_tokens: int) -> Timed:
        """Continue each prompt; time and count while all of them decode, until each has `num_tokens` more.

        Prompts begin one after the other, some steps apart, so that decodes do not suffer. All go on until the last
        has its tokens: had the first ended meanwhile, steps of a smaller batch would be timed.
        """
        self._submit(prompts, [self._engine.limits.max_context - len(prompt) for prompt in prompts])
        self._wait(lambda: len(self._num_tokens) == len(prompts))
        with self._changed:
            enough = {request_id: num + num_tokens for request_id, num in self._num_tokens.items()}
        self._wait(lambda: all(self._num_tokens[one] >= num for one, num in enough.items()))
        for request_id in enough:
            self._engine.abort(request_id)
        self._wait(lambda: self._num_ended == len(prompts))
        seconds, num_timed = self._full_batch(len(prompts), num_tokens)
        return Timed(seconds=seconds, num_tokens=num_timed, token_ids=self._tokens(prompts, num_tokens))

    def _full_batch(self, num_prompts: int, num_tokens: int) -> tuple[float, int]:
        """Return the seconds from the last first token to the moment each has `num_tokens` more, and all tokens."""
        since: Counter[str] = Counter()
        begun: set[str] = set()
        started = 0.0
        for at, same_time in groupby(self._events, key=lambda event: event[0]):
            outputs = [output for _, output in same_time]
            if len(begun) == num_prompts:
                for output in outputs:
                    since[output.request_id] += len(output.token_ids)
                if min(since[request_id] for request_id in begun) >= num_tokens:
                    return at - started, since.total()
            begun |= {output.request_id for output in outputs if output.token_ids}
            started = at if len(begun) == num_prompts and not since else started
        raise SystemExit(f"no {num_tokens} steps in which all of {num_prompts} sequences decoded")

    def _submit(self, prompts: Prompts, lengths: Sequence[int]) -> None:
        self._round += 1
        self._events, self._num_tokens, self._num_ended = [], Counter(), 0
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            sampling = Sampling(temperature=0.0, max_tokens=length, ignore_eos=True)
            request = EngineRequest(
                request_id=f"{self._round}/{index}", prompt_token_ids=tuple(prompt), sampling=sampling
            )
            self._engine.submit(request)

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: condition() or self._error is not None, TIMEOUT_S):
                raise SystemExit(f"the requests did not get there within {TIMEOUT_S} s")
        if self._error is not None:
            raise SystemExit(f"a request failed: {self._error}")

    def _tokens(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        """Return the first tokens that each prompt was continued with."""
        tokens: list[list[int]] = [[] for _ in prompts]
        for _, output in self._events:
            tokens[int(output.request_id.split("/")[1])] += output.token_ids
        return [one[:num_tokens] for one in tokens]

    def _collect(self, outputs: Sequence[TokenOutput]) -> None:
        now = time.perf_counter()
        with self._changed:
            for output in outputs:
                self._events.append((now, output))
                if output.token_ids:
                    self._num_tokens[output.request_id] += len(output.token_ids)
                self._error = self._error or output.error
                self._num_ended += output.finish_reason is not None or output.error is not None
            self._changed.notify_all()
