"""Times requests on an engine from their outputs: the engine's own thread says when each token came."""

import threading
import time
from collections.abc import Sequence

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
        self._round = 0
        engine.start(self._collect)

    def prefill(self, prompt: Sequence[int]) -> Timed:
        """Time a prompt from its submission to the first token."""
        started = time.perf_counter()
        self._run([prompt], 1)
        return Timed(seconds=self._events[-1][0] - started, num_tokens=len(prompt), token_ids=self._tokens(1))

    def decode(self, prompts: Prompts, num_tokens: int) -> Timed:
        """Continue each prompt by `num_tokens`; time and count from the moment every sequence has its first one."""
        self._run(prompts, num_tokens)
        first: dict[str, float] = {}
        for at, output in self._events:
            first.setdefault(output.request_id, at)
        started, ended = max(first.values()), self._events[-1][0]
        num_timed = sum(len(output.token_ids) for at, output in self._events if at > started)
        return Timed(seconds=ended - started, num_tokens=num_timed, token_ids=self._tokens(len(prompts)))

    def _run(self, prompts: Prompts, num_tokens: int) -> None:
        self._round += 1
        self._events = []
        sampling = Sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            request_id = f"{self._round}/{index}"
            self._engine.submit(EngineRequest(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=sampling))
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_ended() == len(prompts), TIMEOUT_S):
                raise SystemExit(f"the requests did not end within {TIMEOUT_S} s")
        for _, output in self._events:
            if output.error is not None:
                raise SystemExit(f"a request failed: {output.error}")

    def _tokens(self, num_prompts: int) -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in range(num_prompts)]
        for _, output in self._events:
            tokens[int(output.request_id.split("/")[1])] += output.token_ids
        return tokens

    def _num_ended(self) -> int:
        return sum(output.finish_reason is not None or output.error is not None for _, output in self._events)

    def _collect(self, outputs: Sequence[TokenOutput]) -> None:
        now = time.perf_counter()
        with self._changed:
            self._events += [(now, output) for output in outputs]
            self._changed.notify_all()
