"""Every head, column, vocabulary row and layer is some member's, and only as many members' as there are copies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from llama4_dist.checkpoint.names import expected_tensors
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.model.weights import Weights
from llama4_dist.partition import Partition, share_of, shares_of
from tests.checkpoints import make_checkpoint

PRESETS = ["scout", "maverick", "topk2", "dense", "conditional"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("scout"), "scout"))


@given(
    num_layers=st.integers(1, 100),
    kv=st.integers(1, 16),
    heads_per_kv=st.integers(1, 8),
    widths=st.tuples(*[st.integers(1, 20_000)] * 3),
    num_stages=st.integers(1, 16),
    num_ranks=st.sampled_from([1, 2, 3, 4, 5, 8, 16]),
)
def test_every_layer_head_column_and_word_is_held_exactly_once(
    checkpoint: Checkpoint,
    num_layers: int,
    kv: int,
    heads_per_kv: int,
    widths: tuple[int, int, int],
    num_stages: int,
    num_ranks: int,
) -> None:
    expert_width, dense_width, vocab_size = widths
    config = replace(
        checkpoint.config,
        num_layers=num_layers,
        num_heads=kv * heads_per_kv,
        num_kv_heads=kv,
        expert_width=expert_width,
        dense_width=dense_width,
        vocab_size=vocab_size,
    )
    partition = Partition(num_stages=num_stages, num_ranks=num_ranks)
    fits = num_stages <= num_layers and config.num_heads % num_ranks == 0 and min(widths) >= num_ranks
    assume(fits and (kv % num_ranks == 0 or num_ranks % kv == 0))
    shares = shares_of(config, partition)
    assert [layer for share in shares[::num_ranks] for layer in share.layers] == list(range(num_layers))
    ranks = shares[:num_ranks]
    for whole, parts in [
        (config.num_heads, [share.heads for share in ranks]),
        (expert_width, [share.shared_columns for share in ranks]),
        (dense_width, [share.dense_columns for share in ranks]),
        (vocab_size, [share.vocabulary for share in ranks]),
    ]:
        assert [number for part in parts for number in part] == list(range(whole))
        assert all(parts)
    copies = max(1, num_ranks // kv)
    assert sorted(g for share in ranks for g in share.kv_heads) == sorted([*range(kv)] * copies)
    for share in ranks:  # a rank's queries read the keys that it holds
        assert {head // heads_per_kv for head in share.heads} == set(share.kv_heads)


def test_columns_are_cut_at_multiples_of_a_strip_where_there_are_enough() -> None:
    """Scout's and Maverick's widths among 8 ranks, and one that no alignment divides."""
    config = _geometry(expert_width=8192, dense_width=16384, vocab_size=202048, num_heads=40, num_kv_heads=8)
    for share in shares_of(config, Partition(num_ranks=8)):
        assert len(share.shared_columns) == 1024
        assert len(share.dense_columns) == 2048
        assert share.vocabulary.start % 128 == 0
    uneven = _geometry(expert_width=200, dense_width=200, vocab_size=200)
    assert [len(share.shared_columns) for share in shares_of(uneven, Partition(num_ranks=2))] == [128, 72]


@pytest.mark.parametrize(
    ("partition", "changes", "message"),
    [
        ({"num_stages": 5}, {}, r"num_stages=5 exceeds num_layers=4.*take fewer"),
        ({"num_ranks": 3}, {}, r"num_ranks=3 does not divide num_heads=4: take a divisor"),
        ({"num_ranks": 4}, {"num_heads": 12, "num_kv_heads": 6}, r"num_ranks=4 neither divides num_kv_heads=6.*take 6"),
        ({"num_ranks": 4}, {"expert_width": 3}, r"expert_width=3 is less than num_ranks=4: take fewer"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_with_the_remedy(
    partition: dict[str, int], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shares_of(_geometry(**changes), Partition(**partition))


@pytest.mark.parametrize("wrong", [{"num_stages": 0}, {"num_ranks": -1}])
def test_a_group_without_members_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Partition(**wrong)


def test_a_member_that_does_not_exist_has_no_share() -> None:
    with pytest.raises(ValueError, match="name no member"):
        share_of(_geometry(), Partition(num_stages=2), stage=2, rank=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("partition", [Partition(num_stages=2, num_ranks=2), Partition(num_ranks=4)], ids=str)
def test_members_tensors_put_together_are_the_checkpoints(tmp_path: Path, preset: str, partition: Partition) -> None:
    """Cut by name, then joined along the axis that was cut; keys and values that are copies are counted once."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, preset))
    config = checkpoint.config
    readers = [
        Weights(checkpoint, dtype=torch.float32, device=torch.device("cpu"), share=share)
        for share in shares_of(config, partition)[: partition.num_ranks]
    ]
    copies = max(1, partition.num_ranks // config.num_kv_heads)
    for name in expected_tensors(config):
        if ".experts." in name:
            continue
        whole = checkpoint.tensor(name)
        step = copies if name.endswith(("k_proj.weight", "v_proj.weight")) else 1
        parts = [reader.stored(name) for reader in readers[::step]]
        rows, columns = readers[0].share.cut(name)
        if rows is None and columns is None:
            assert all(torch.equal(part, whole) for part in parts)
        else:
            assert torch.equal(torch.cat(parts, dim=0 if columns is None else 1), whole)
        assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts), "a copy"


def _geometry(**changes: int) -> ModelConfig:
    fields: dict[str, Any] = {
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "expert_width": 96,
        "dense_width": 160,
    }
    return ModelConfig(
        architecture="Llama4ForCausalLM",
        dtype="bfloat16",
        hidden_size=64,
        head_dim=16,
        num_experts=16,
        experts_per_token=1,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=None,
        rope_layers=(True,) * 4,
        chunked_layers=(True,) * 4,
        moe_layers=(True,) * 4,
        chunk_size=16,
        use_qk_norm=True,
        temperature_tuning=False,
        floor_scale=32.0,
        attn_scale=0.1,
        tie_word_embeddings=False,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
        **({"vocab_size": 320} | fields | changes),
    )
