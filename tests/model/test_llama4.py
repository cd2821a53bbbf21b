"""Loading reads what the attention side needs and nothing else; sequences cannot reach each other's cache."""

from pathlib import Path

import pytest
import torch

from llama4_dist.checkpoint.names import num_expert_parameters
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.batch import Batch, SequenceSpan
from llama4_dist.model.llama4 import Llama4
from tests.checkpoints import make_checkpoint
from tests.model.direct import DirectDispatcher, Runner


@pytest.mark.parametrize("preset", ["maverick", "dense", "conditional"])
def test_loading_maps_all_text_weights_except_routed_experts(tmp_path: Path, preset: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, preset))
    config, reported = checkpoint.config, []
    model = Llama4.load(
        checkpoint, dtype=torch.float32, device="cpu", progress=lambda done, total: reported.append((done, total))
    )
    routed = len(config.moe_layer_ids) * config.num_experts * num_expert_parameters(config)
    assert model.num_parameters == checkpoint.num_parameters - routed
    assert checkpoint.bytes_mapped == model.num_parameters * 4
    assert reported == [(layer + 1, config.num_layers) for layer in range(config.num_layers)]


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = Llama4.load(Checkpoint.open(make_checkpoint(tmp_path, "dense")), dtype=torch.float32, device="cpu")
    assert model.head_VD is model.embedding_VD


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("scout"), "scout"))


def test_weights_stored_otherwise_are_cast_to_the_compute_dtype(checkpoint: Checkpoint) -> None:
    runner = Runner.load(checkpoint, dtype=torch.bfloat16)
    (logits_TV,) = runner.run([(0, [1, 2, 3])])
    assert runner.model.embedding_VD.dtype == torch.bfloat16
    assert logits_TV.dtype == torch.float32
    assert logits_TV.isfinite().all()


def test_what_another_sequence_left_in_the_cache_does_not_reach_this_one(checkpoint: Checkpoint) -> None:
    """Not even as NaN, which no mask would stop."""
    runner = Runner.load(checkpoint, num_sequences=2)
    owned = [{page for run in sequence.pages for page in run.ids} for sequence in runner.sequences]
    index = 1 if 0 in owned[0] else 0  # page 0 is where a careless plan would point its padding
    expected_TV = runner.in_chunks(list(range(40)), [30, 1], index)
    runner.restart()
    own = torch.tensor([page * 5 + i for page in sorted(owned[index]) for i in range(5)])
    for slots in {id(slots): slots for layer in range(4) for slots in runner.cache.slots(layer)}.values():
        kept = slots[own]
        slots.fill_(float("nan"))
        slots[own] = kept
    assert torch.equal(runner.in_chunks(list(range(40)), [30, 1], index), expected_TV)


def test_only_the_wanted_rows_get_logits_and_the_step_is_announced(checkpoint: Checkpoint) -> None:
    runner = Runner.load(checkpoint)
    (expected_TV,) = runner.run([(0, [5, 6, 7, 8])])
    span = SequenceSpan(num_tokens=4, num_cached=0, pages=runner.sequences[0].pages)
    for rows in ((), (3,), (1, 3)):
        batch = Batch(step=9, token_ids_T=torch.tensor([5, 6, 7, 8]), spans=(span,), logit_rows=rows)
        logits_PV = runner.model.forward(batch, runner.cache, runner.dispatcher)
        assert torch.equal(logits_PV, expected_TV[list(rows)])
    assert isinstance(runner.dispatcher, DirectDispatcher)
    assert runner.dispatcher.steps == [1, 9, 9, 9]
