"""A model cut into stages and ranks gives the logits of transformers, and bits that depend on the cut alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.partition import Partition
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner
from tests.model.references import load_reference, reference_logits
from tests.model.test_batch_invariance import MIDDLE
from tests.stages.groups import running_group

TOLERANCE = 2e-4  # as without a cut
CUTS = [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (4, 4)]
DTYPES = [torch.float32, torch.bfloat16]


def random_ids(count: int, seed: int = 3) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("preset", ["scout", "maverick", "behemoth", "dense", "topk2", "conditional"])
def test_any_cut_gives_the_reference_logits(arithmetic: str, tmp_path: Path, preset: str) -> None:
    """Prefill in chunks, then decode; two key/value heads among four ranks are held by two each."""
    path = make_checkpoint(tmp_path, preset)
    checkpoint = Checkpoint.open(path)
    token_ids = random_ids(70)
    expected_TV = reference_logits(load_reference(path, preset), token_ids)
    whole_TV = Runner.load(checkpoint).in_chunks(token_ids, [41, 22, 1])
    for num_stages, num_ranks in CUTS:
        with running_group(checkpoint, Partition(num_stages=num_stages, num_ranks=num_ranks)) as group:
            logits_TV = group.in_chunks(token_ids, [41, 22, 1])
        torch.testing.assert_close(logits_TV, expected_TV, rtol=0.0, atol=TOLERANCE)
        if num_ranks == 1:
            assert torch.equal(logits_TV, whole_TV), f"{num_stages} stages changed a bit"


def test_ninety_six_narrow_layers_in_four_stages_give_the_bits_of_one(tmp_path: Path) -> None:
    """As many layers as the project's Behemoth has, whose geometry is synthetic; experts in every layer."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "behemoth", num_hidden_layers=96))
    token_ids = random_ids(50)
    whole_TV = Runner.load(checkpoint).in_chunks(token_ids, [39, 1])
    with running_group(checkpoint, Partition(num_stages=4)) as group:
        assert torch.equal(group.in_chunks(token_ids, [39, 1]), whole_TV)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", [(1, 2), (2, 4)], ids=str)
def test_a_tokens_bits_do_not_depend_on_its_company(
    arithmetic: str, tmp_path: Path, dtype: torch.dtype, cut: tuple[int, int]
) -> None:
    """Alone, in a batch of five, and in other chunks: another rank asks for its experts, and parts end elsewhere."""
    geometry = MIDDLE | {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout", dtype=dtype, **geometry))
    token_ids = random_ids(140)
    partition = Partition(num_stages=cut[0], num_ranks=cut[1])
    with running_group(checkpoint, partition, dtype=dtype, num_sequences=5, max_tokens=200) as group:
        alone_TV = group.in_chunks(token_ids, [130, 1])
        group.restart()
        assert torch.equal(group.in_chunks(token_ids, [1, 50, 3, 29]), alone_TV)
        group.restart()
        prompts = [random_ids(17 + 31 * i, seed=i) for i in range(5)]
        prompts[3] = token_ids[:130]
        logits = [group.run(list(enumerate(prompts)))[3]]
        for token in token_ids[130:]:
            logits.append(group.run([(i, [token]) for i in range(5)])[3])
        assert torch.equal(torch.cat(logits), alone_TV)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bfloat16_ranks_are_as_close_to_float32_as_one_rank_is(arithmetic: str, tmp_path: Path, num_ranks: int) -> None:
    """The stored weights are the same; what differs is how often a sum is rounded on its way."""
    path = make_checkpoint(tmp_path, "scout", dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(path)
    token_ids = random_ids(60)
    exact_TV = reference_logits(load_reference(path, "scout"), token_ids)
    whole_TV = Runner.load(checkpoint, dtype=torch.bfloat16).in_chunks(token_ids, [41, 1])
    with running_group(checkpoint, Partition(num_ranks=num_ranks), dtype=torch.bfloat16) as group:
        cut_TV = group.in_chunks(token_ids, [41, 1])
    assert _distance(cut_TV, exact_TV) <= 1.25 * _distance(whole_TV, exact_TV)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_the_number_of_parts_changes_no_bit(tmp_path: Path, num_parts: int) -> None:
    """A span on a border is cut: its second half sees the keys of the first in every stage."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "topk2"))
    token_ids = random_ids(61)
    whole_TV = Runner.load(checkpoint).in_chunks(token_ids, [43, 1])
    with running_group(checkpoint, Partition(num_stages=3), depth=num_parts) as group:
        assert torch.equal(group.in_chunks(token_ids, [43, 1]), whole_TV)


def test_ranks_whose_members_overlap_with_their_experts_meet_in_the_same_order(tmp_path: Path) -> None:
    """Two parts for two stages, each in two microbatches that take turns in every layer."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "maverick"))
    token_ids, partition = random_ids(61), Partition(num_stages=2, num_ranks=2)
    with running_group(checkpoint, partition) as group:
        expected_TV = group.in_chunks(token_ids, [43, 1])
    with running_group(checkpoint, partition, num_microbatches=2) as group:
        assert torch.equal(group.in_chunks(token_ids, [43, 1]), expected_TV)


def _distance(logits_TV: Tensor, exact_TV: Tensor) -> float:
    return float((logits_TV - exact_TV).square().mean().sqrt())
