"""A step in two parts has the bits of a step in one, wherever it is cut."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.batch import Batch, PageRun, SequenceSpan
from llama4_dist.model.microbatches import run_layers, split_spans
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner

PAGES = (PageRun(first_block=0, ids=(0, 1, 2)),)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), max_size=6), st.integers(1, 4))
def test_parts_hold_all_tokens_in_order_and_are_equally_large(counts: list[tuple[int, int]], num_parts: int) -> None:
    spans = [SequenceSpan(num_tokens=count, num_cached=cached, pages=PAGES) for count, cached in counts]
    parts = split_spans(spans, num_parts)
    positions = [(cached, cached + i) for count, cached in counts for i in range(count)]
    found = [span.num_cached + i for part in parts for span in part for i in range(span.num_tokens)]
    assert found == [position for _, position in positions]
    sizes = [sum(span.num_tokens for span in part) for part in parts]
    assert len(parts) == max(1, min(num_parts, len(positions)))
    assert max(sizes) - min(sizes) <= 1
    assert all(span.num_tokens > 0 for part in parts for span in part)


class Recorder:
    """A layer that writes down what it is asked."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def begin(self, part: str) -> None:
        self.log.append(f"begin {self.name}{part}")

    def finish(self, part: str) -> None:
        self.log.append(f"finish {self.name}{part}")


def test_a_part_waits_after_the_other_has_sent_its_rows() -> None:
    log: list[str] = []
    run_layers([Recorder("0", log), Recorder("1", log)], ["a", "b"])
    order = "begin 0a, begin 0b, finish 0a, begin 1a, finish 0b, begin 1b, finish 1a, finish 1b"
    assert ", ".join(log) == order


@pytest.mark.parametrize("preset", ["scout", "maverick", "topk2"])
def test_logits_in_two_parts_are_those_in_one(tmp_path: Path, preset: str, arithmetic: str) -> None:
    """Prompts and decodes together; the border lies between sequences, within a prompt, and at its chunk's edge."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, preset))
    steps: list[list[tuple[int, Sequence[int]]]] = [
        [(0, range(1, 14))],
        [(0, range(14, 40)), (1, range(7))],
        [(0, [3]), (1, [9]), (2, range(5, 28))],
    ]
    logits: list[list[torch.Tensor]] = []
    for num_parts in (1, 2):
        runner = Runner.load(checkpoint, num_sequences=3)
        forward = runner.model.forward

        def in_parts(batch: Batch, *rest: Any, num_parts: int = num_parts, forward: Any = forward) -> Any:
            return forward(replace(batch, num_microbatches=num_parts), *rest)

        runner.model.forward = in_parts  # type: ignore[method-assign, assignment]
        logits.append([logits_TV for step in steps for logits_TV in runner.run(step)])
    for one_TV, two_TV in zip(*logits, strict=True):
        assert torch.equal(one_TV, two_TV)
