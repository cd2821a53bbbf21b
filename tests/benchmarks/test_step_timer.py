"""Timed steps on a tiny model: what the real model is asked for, and what is counted."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.step_timer import Steps
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import OverloadedError
from tests.checkpoints import make_checkpoint


class Recorder:
    """Lets a model be, and remembers the batches it got."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.batches: list[Any] = []

    def forward(self, batch: Any, cache: Any, dispatcher: Any) -> Any:
        self.batches.append(batch)
        return self._model.forward(batch, cache, dispatcher)


def test_only_decode_steps_at_the_wanted_context_are_computed(tmp_path: Path) -> None:
    options = EngineOptions(max_num_seqs=4, max_num_batched_tokens=32, kv_cache_bytes=1 << 24)
    engine = build_single_process(make_checkpoint(tmp_path, "scout"), options=options, num_threads=1)
    recorder = engine.core.runner.model = Recorder(engine.core.runner.model)
    try:
        seconds, _ = Steps(engine.core).decode(3, 100, 4)
    finally:
        engine.close()
    assert engine.core.runner.model is recorder, "the stand-in has gone"
    spans = [[(span.num_tokens, span.num_cached) for span in batch.spans] for batch in recorder.batches]
    # The first token after the prompt comes from the stand-in's step; two steps warm up, four are timed.
    # Prompts of one token budget end one after the other, so the first sequences may be some tokens ahead.
    assert len(spans) >= 6
    assert all(num_tokens == 1 and num_cached >= 100 for step in spans for num_tokens, num_cached in step)
    assert [num_cached for _, num_cached in spans[0]][-1] == 100
    assert not engine.core.scheduler.live(), "they end with the measurement"
    assert seconds["step"] >= max(seconds["attention"], seconds["expert"]) > 0
    assert seconds["rest"] < 0.5 * seconds["step"], "stations tell where most of a step goes"


def test_sequences_go_on_with_different_tokens(tmp_path: Path) -> None:
    options = EngineOptions(max_num_seqs=4, kv_cache_bytes=1 << 24)
    engine = build_single_process(make_checkpoint(tmp_path, "scout"), options=options, num_threads=1)
    recorder = engine.core.runner.model = Recorder(engine.core.runner.model)
    try:
        Steps(engine.core).decode(4, 20, 1)
    finally:
        engine.close()
    first = recorder.batches[0].token_ids_T.tolist()
    assert len(set(first)) > 1, "one token in all sequences would send all rows to one expert"


def test_a_context_that_ends_while_steps_are_timed_is_refused(tmp_path: Path) -> None:
    options = EngineOptions(max_num_seqs=1, kv_cache_bytes=1 << 20, max_context=64)
    engine = build_single_process(make_checkpoint(tmp_path, "scout"), options=options, num_threads=1)
    try:
        with pytest.raises(ValueError, match="came to the end"):
            Steps(engine.core).decode(1, 60, 9)
    finally:
        engine.close()


def test_a_context_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    options = EngineOptions(max_num_seqs=1, kv_cache_bytes=1 << 18)
    engine = build_single_process(make_checkpoint(tmp_path, "scout"), options=options, num_threads=1)
    try:
        with pytest.raises(OverloadedError, match="no room in the context"):
            Steps(engine.core).decode(1, 1000, 1)
    finally:
        engine.close()
