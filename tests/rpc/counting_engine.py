"""An engine whose answers can be checked by hand: token i of a prompt that starts with p is p + i + 1."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from llama4_dist.engine.port import EngineStats, OnOutputs
from llama4_dist.errors import OverloadedError
from llama4_dist.request import (
    EngineLimits,
    EngineRequest,
    FinishReason,
    PositionLogprobs,
    TokenLogprob,
    TokenOutput,
)

VOCAB = 50


class CountingEngine:
    """Takes steps only when told to, so a test decides what happens between two of them."""

    def __init__(self, *, max_waiting: int = 8) -> None:
        self.limits = EngineLimits(model="counting", vocab_size=VOCAB, max_context=64, max_waiting=max_waiting)
        self.running: dict[str, tuple[EngineRequest, int]] = {}
        self.submitted: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.closed = False
        self._lock = threading.Lock()
        self._on_outputs: OnOutputs = lambda _outputs: None

    def start(self, on_outputs: OnOutputs) -> None:
        self._on_outputs = on_outputs

    def submit(self, request: EngineRequest) -> None:
        with self._lock:
            if len(self.running) >= self.limits.max_waiting:
                raise OverloadedError("the queue is full: retry later", retry_after_s=1.5)
            self.running[request.request_id] = (request, len(request.output_token_ids))
            self.submitted.append(request)

    def attach(self, request: EngineRequest) -> None:
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self.running.pop(request_id, None) is None:
                return
            self.aborted.append(request_id)
        self._on_outputs([TokenOutput(request_id=request_id, finish_reason=FinishReason.CANCELLED)])

    def step(self) -> None:
        """Emit one token for every running request; those that reach max_tokens end."""
        outputs = []
        with self._lock:
            for request_id, (request, emitted) in list(self.running.items()):
                last = emitted + 1 == request.sampling.max_tokens
                token_id = request.prompt_token_ids[0] + emitted + 1
                entry = PositionLogprobs(token=TokenLogprob(token_id=token_id, logprob=-1.0, rank=1))
                outputs.append(
                    TokenOutput(
                        request_id=request_id,
                        token_ids=(token_id,),
                        logprobs=(entry,) if request.sampling.logprobs is not None else None,
                        queue_s=0.25 if emitted == 0 else None,
                        finish_reason=FinishReason.LENGTH if last else None,
                    )
                )
                if last:
                    del self.running[request_id]
                else:
                    self.running[request_id] = (request, emitted + 1)
        if outputs:
            self._on_outputs(outputs)

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        """Row t holds t * VOCAB + v at column v."""
        return torch.arange(len(token_ids) * VOCAB, dtype=torch.float32).view(len(token_ids), VOCAB)

    def stats(self) -> EngineStats:
        return EngineStats(steps=3, host_rows={"expert-0": 7}, host_bytes_out={"expert-0": 2**40}, max_queue_age_s=0.5)

    def close(self) -> None:
        self.closed = True
