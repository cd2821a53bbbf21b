"""A quantised model cut into stages and ranks: each rank reads its part of numbers and scales, and no group is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.checkpoint.names import is_routed
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.build import build_single_process
from llama4_dist.errors import ConfigError
from llama4_dist.model.weights import Weights
from llama4_dist.partition import Partition, share_of
from tests.model.direct import Runner
from tests.model.references import load_reference, reference_logits
from tests.quantised_checkpoints import decompress, make_quantised, stored_tensors
from tests.stages.groups import running_group
from tests.stages.test_group_logits import TOLERANCE, random_ids

FOUR_RANKS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 128,  # in groups of 32
}


@pytest.mark.parametrize("form", ["int8", "int8-groups", "int4", "int4-channel"])
@pytest.mark.parametrize("preset", ["scout", "maverick"])
def test_any_cut_gives_the_logits_of_transformers(arithmetic: str, tmp_path: Path, preset: str, form: str) -> None:
    path = make_quantised(tmp_path, form, preset, linears=True, **FOUR_RANKS)
    checkpoint = Checkpoint.open(path)
    token_ids = random_ids(40)
    expected_TV = reference_logits(load_reference(path, preset), token_ids)
    whole_TV = Runner.load(checkpoint).in_chunks(token_ids, [23, 16, 1])
    for num_stages, num_ranks in [(4, 1), (1, 2), (2, 4)]:
        with running_group(checkpoint, Partition(num_stages=num_stages, num_ranks=num_ranks)) as group:
            logits_TV = group.in_chunks(token_ids, [23, 16, 1])
        torch.testing.assert_close(logits_TV, expected_TV, rtol=0.0, atol=TOLERANCE)
        if num_ranks == 1:
            assert torch.equal(logits_TV, whole_TV), f"{num_stages} stages changed a bit"


@pytest.mark.parametrize("form", ["fp8", "int8", "int8-groups", "int8-plain", "int4", "int4-channel"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_read_their_parts_and_no_other_byte(tmp_path: Path, form: str, num_ranks: int) -> None:
    """Side by side, what they read is what compressed-tensors reads; together they map each number once."""
    path = make_quantised(tmp_path, form, "maverick", linears=True, **FOUR_RANKS)
    checkpoint = Checkpoint.open(path)
    stored = stored_tensors(path)
    names = [name for name in checkpoint.quantised if not is_routed(name)]
    assert len(names) == 4 * 7
    for name in names:
        module = name.removesuffix("weight")
        parts = {key.removeprefix(module): part for key, part in stored.items() if key.startswith(module)}
        expected_FD = decompress(parts, form).float()
        before, shares = checkpoint.bytes_mapped, []
        for rank in range(num_ranks):
            share = share_of(checkpoint.config, Partition(num_ranks=num_ranks), stage=0, rank=rank)
            weights = Weights(checkpoint, dtype=torch.float32, device=torch.device("cpu"), share=share)
            shares.append(weights.tensor(name))
        is_cut_by_input = name.endswith(("o_proj.weight", "down_proj.weight"))
        torch.testing.assert_close(torch.cat(shares, int(is_cut_by_input)), expected_FD, rtol=1e-6, atol=0)
        linear = checkpoint.quantised[name]
        scales = linear.scale.num_bytes * (num_ranks if is_cut_by_input and form not in ("int8-groups", "int4") else 1)
        assert checkpoint.bytes_mapped - before == linear.stored.num_bytes + scales


def test_a_partition_that_cuts_a_group_is_refused_with_those_that_fit(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "int4", linears=True)  # heads of 16 in groups of 32: two ranks, not four
    message = r"num_ranks=4 cuts groups of model.layers.0.self_attn.o_proj.weight, .*: take one of 1, 2$"
    with pytest.raises(ConfigError, match=message):
        build_single_process(path, partition=Partition(num_ranks=4))
    with pytest.raises(ValueError, match=r"inputs \[0, 16\) cut a group: give multiples of 32"):
        Checkpoint.open(path).tensor("model.layers.0.self_attn.o_proj.weight", columns=range(16))
    experts_only = make_quantised(tmp_path / "experts", "int4")
    build_single_process(experts_only, partition=Partition(num_ranks=4)).close()
