"""Times single steps of an engine's core, term by term; long contexts come into its cache without being computed."""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quiet import undisturbed
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.options import EngineOptions
from llama4_dist.model.batch import Batch
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.request import EngineRequest, Sampling

STEP = "step"
WARM_UP_STEPS = 2


class InstantModel:
    """Stands in for the model while a prompt only has to be in the cache: computes no keys, and draws its logits.

    Were they equal, all sequences would go on with one token, and all rows to one expert.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(0)

    def forward(self, batch: Batch, cache: KVCache, dispatcher: Any) -> Tensor:
        return torch.rand(len(batch.logit_rows), self._vocab_size, generator=self._generator)


class Steps:
    """An engine core whose steps are timed, term by term."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._instant_model = InstantModel(core.limits.vocab_size)

    def decode(self, num_sequences: int, context: int, num_steps: int) -> tuple[dict[str, float], float]:
        """Return the median seconds of every term in a decode step of sequences with that many cached positions.

        And what share of the processors other processes had meanwhile.
        """
        core = self._core
        # As many as fit: prompts end one after the other, and disturbed steps are taken again.
        room = max(1, core.limits.max_context - context)
        sampling = Sampling(temperature=0.0, max_tokens=room, ignore_eos=True)
        for index in range(num_sequences):
            # Each prompt is another one, so that no pages are shared.
            prompt = tuple((index * 7 + position * 13) % 251 for position in range(context))
            core.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        with self._without_model():
            while any(sequence.num_pending > 1 for sequence in core.scheduler.live()):
                core.step()
        for _ in range(WARM_UP_STEPS):
            core.step()
        steps, share = undisturbed(lambda: [self._one() for _ in range(num_steps)], (os.getpid(),))
        live = core.scheduler.live()
        if len(live) < num_sequences:
            raise ValueError(
                f"{num_sequences - len(live)} sequences came to the end of the context: shorten {context=}"
            )
        for sequence in live:
            core.abort(sequence.request_id)
        return {term: statistics.median(step[term] for step in steps) for term in steps[0]}, share

    @contextmanager
    def _without_model(self) -> Iterator[None]:
        """Let steps compute nothing."""
        runner = self._core.runner
        model, runner.model = runner.model, self._instant_model
        try:
            yield
        finally:
            runner.model = model

    def _one(self) -> dict[str, float]:
        """Run a step; return its seconds, those of the core's stations but their sum, and the rest."""
        stations = self._core.counters.stations
        before, started = stations.seconds(), time.perf_counter()
        self._core.step()
        step_s = time.perf_counter() - started
        spent = {name: total_s - before[name] for name, total_s in stations.seconds().items() if name != "model"}
        return {STEP: step_s} | spent | {"rest": step_s - sum(spent.values())}


@contextmanager
def engine_steps(model_dir: Path, options: EngineOptions, *, num_hosts: int = 1, num_threads: int) -> Iterator[Steps]:
    engine = build_single_process(model_dir, options=options, num_inproc_hosts=num_hosts, num_threads=num_threads)
    try:
        with torch.inference_mode():
            yield Steps(engine.core)
    finally:
        engine.close()
