"""An engine whose tokens a reader can compute by hand, with a step length of the test's choice and real bounds."""

import threading
import time
from collections.abc import Sequence

from torch import Tensor

from llama4_dist.engine.port import EngineStats, OnOutputs, unknown_request
from llama4_dist.errors import DeadlineExceededError, Llama4Error, OverloadedError
from llama4_dist.request import (
    EngineLimits,
    EngineRequest,
    FinishReason,
    PositionLogprobs,
    TokenLogprob,
    TokenOutput,
)

LETTERS = b"abcdefghijklmnopqrstuvwxyz"


def expected_token(prompt: Sequence[int], index: int, position: int) -> int:
    """Token `position` of sequence `index`: a letter fixed by prompt, index and position."""
    return LETTERS[(sum(prompt) + 7 * index + 3 * position) % 26]


def expected_tokens(prompt: Sequence[int], num_tokens: int, index: int = 0) -> tuple[int, ...]:
    """The whole output."""
    return tuple(expected_token(prompt, index, position) for position in range(num_tokens))


class Running:
    """One sequence in the engine."""

    def __init__(self, request: EngineRequest, now_s: float) -> None:
        self.request = request
        self.submitted_s = now_s
        self.num_tokens = 0


class ScriptedEngine:
    """Steps in its own thread every `step_s`; `running_bound` sequences run, `limits.max_waiting` more wait.

    `paused` holds all steps; `fail_at` maps a token position to the error the sequence then ends with.
    """

    def __init__(self, *, step_s: float = 0.0, running_bound: int = 1024, max_waiting: int = 4096) -> None:
        self.limits = EngineLimits(model="tiny", vocab_size=320, max_context=512, max_waiting=max_waiting)
        self.step_s = step_s
        self.running_bound = running_bound
        self.paused = threading.Event()
        self.fail_at: dict[int, Llama4Error] = {}
        self.submitted: list[EngineRequest] = []
        self.num_steps = 0
        self.queue_age_s = 0.0
        self.stats_error: Exception | None = None
        self._sequences: dict[str, Running] = {}
        self._aborted: list[str] = []
        self._changed = threading.Condition()
        self._on_outputs: OnOutputs = lambda _outputs: None
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)

    @property
    def num_held(self) -> int:
        """Sequences that hold a place (stands for KV blocks)."""
        return len(self._sequences)

    def start(self, on_outputs: OnOutputs) -> None:
        self._on_outputs = on_outputs
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        with self._changed:
            if len(self._sequences) >= self.running_bound + self.limits.max_waiting:
                raise OverloadedError("the queue is full", retry_after_s=0.2)
            self._sequences[request.request_id] = Running(request, time.monotonic())
            self.submitted.append(request)
            self._changed.notify()

    def attach(self, request: EngineRequest) -> None:
        self._on_outputs([TokenOutput(request_id=request.request_id, error=unknown_request())])

    def abort(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._sequences:
                self._aborted.append(request_id)
                self._changed.notify()

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        if self.stats_error is not None:
            raise self.stats_error
        held = self.num_held
        return EngineStats(
            requests_running=min(held, self.running_bound),
            requests_waiting=max(0, held - self.running_bound),
            kv_blocks_total=1000,
            kv_blocks_free=1000 - held,
            steps=self.num_steps,
            max_queue_age_s=self.queue_age_s,
            host_bytes_out={"expert-0": 5},
            host_transports={"expert-0": "inproc"},
        )

    def close(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify()
        if self._thread.ident is not None:  # a gateway that did not come up has not started it
            self._thread.join(timeout=60)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or self._sequences)
                if self._stop:
                    return
                outputs = self._cancelled() + ([] if self.paused.is_set() else self._step())
            if outputs:
                self._on_outputs(outputs)
            time.sleep(self.step_s if outputs else 0.001)

    def _cancelled(self) -> list[TokenOutput]:
        aborted, self._aborted = self._aborted, []
        for request_id in aborted:
            self._sequences.pop(request_id, None)
        return [TokenOutput(request_id=one, finish_reason=FinishReason.CANCELLED) for one in aborted]

    def _step(self) -> list[TokenOutput]:
        self.num_steps += 1
        now_s = time.monotonic()
        outputs = [self._advance(one, now_s) for one in list(self._sequences.values())[: self.running_bound]]
        for output in outputs:
            if output.finish_reason is not None or output.error is not None:
                del self._sequences[output.request_id]
        return outputs

    def _advance(self, running: Running, now_s: float) -> TokenOutput:
        request, position = running.request, running.num_tokens
        if position in self.fail_at:
            return TokenOutput(request_id=request.request_id, error=self.fail_at[position])
        if request.timeout_s is not None and now_s - running.submitted_s > request.timeout_s:
            return TokenOutput(request_id=request.request_id, error=DeadlineExceededError("too late"))
        token_id = expected_token(request.prompt_token_ids, request.sequence_index, position)
        running.num_tokens += 1
        stopped = token_id in request.sampling.stop_token_ids
        finished = FinishReason.LENGTH if running.num_tokens == request.sampling.max_tokens else None
        entry = TokenLogprob(token_id=token_id, logprob=-0.5, rank=1)
        return TokenOutput(
            request_id=request.request_id,
            token_ids=(token_id,),
            logprobs=(PositionLogprobs(token=entry, top=(entry,)),) if request.sampling.logprobs is not None else None,
            prompt_logprobs=(None,) * len(request.prompt_token_ids)
            if position == 0 and request.sampling.prompt_logprobs is not None
            else None,
            finish_reason=FinishReason.STOP if stopped else finished,
            stop_token_id=token_id if stopped else None,
            queue_s=0.25 if position == 0 else None,
        )
