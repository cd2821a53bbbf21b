"""Runs requests on any engine and collects what comes out; the reference is the engine in one process."""

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.port import Engine
from llama4_dist.request import EngineRequest, Sampling, TokenOutput
from tests.waiting import PATIENCE_S

Tokens = dict[str, tuple[int, ...]]


class Collector:
    """Outputs by request; `start` an engine with `collect`."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, TokenOutput] = {}
        self._changed = threading.Condition()

    def collect(self, outputs: Sequence[TokenOutput]) -> None:
        with self._changed:
            for output in outputs:
                assert output.request_id not in self.last, "an output came after the last one"
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None or output.error is not None:
                    self.last[output.request_id] = output
            self._changed.notify_all()

    def run(self, engine: Engine, requests: Sequence[EngineRequest]) -> Tokens:
        """Submit all, wait for all; an error of any request is raised."""
        for request in requests:
            engine.submit(request)
        ids = [request.request_id for request in requests]
        self.wait_for(ids)
        for request_id in ids:
            if (error := self.last[request_id].error) is not None:
                raise error
        return {request_id: tuple(self.tokens[request_id]) for request_id in ids}

    def wait_for(self, ids: Sequence[str]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: all(i in self.last for i in ids), PATIENCE_S), "requests did not end"

    def wait_for_tokens(self, request_id: str, count: int) -> None:
        with self._changed:
            enough = self._changed.wait_for(lambda: len(self.tokens.get(request_id, ())) >= count, PATIENCE_S)
            assert enough, f"{request_id} did not get {count} tokens"


def some_requests(prefix: str, count: int = 6, max_tokens: int = 12) -> list[EngineRequest]:
    """Prompts of different lengths, greedy and seeded in turn."""
    generator = torch.Generator().manual_seed(7)
    return [
        EngineRequest(
            request_id=f"{prefix}{index}",
            prompt_token_ids=tuple(torch.randint(0, 256, (3 + 9 * index,), generator=generator).tolist()),
            sampling=Sampling(
                temperature=0.0 if index % 2 == 0 else 0.8, seed=index, max_tokens=max_tokens, ignore_eos=True
            ),
        )
        for index in range(count)
    ]


def reference(
    model_dir: Path, requests: Sequence[EngineRequest], weights: str = "stored", expert_slices: int = 1
) -> Tokens:
    """What one process says."""
    engine = build_single_process(model_dir, weights=weights, expert_slices=expert_slices, num_threads=1)
    collector = Collector()
    engine.start(collector.collect)
    try:
        return collector.run(engine, requests)
    finally:
        engine.close()
