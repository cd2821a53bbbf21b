"""The native passes compute what the obvious version does, with bits that no thread count or vector width changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.cpu.feed_forward import Network, network_of, run_networks
from llama4_dist.model.cpu.llama4 import CpuLlama4
from llama4_dist.model.cpu.panels import pack
from llama4_dist.model.llama4 import Llama4
from llama4_dist.model.weights import Weights
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner
from tests.native.compiler import needs_compiler
from tests.native.narrow import AVX2, computing_with, narrow_passes

pytestmark = needs_compiler

SHAPES = [(64, 96), (100, 37), (1, 1), (300, 1030), (257, 64)]
NUMS_ROWS = [1, 2, 3, 5, 6, 7, 13, 40]
GENERATOR = torch.Generator().manual_seed(0)
TOKEN_IDS = torch.randint(0, 256, (70,), generator=GENERATOR).tolist()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_product_is_the_product(
    shape: tuple[int, int], dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    width, num_columns = shape
    weight_FD, x_RD = random(num_columns, width, dtype=dtype), random(40, width)
    packed = pack(weight_FD)
    expected_RF = (x_RD.double() @ weight_FD.double().T).float()
    whole_RF = packed(x_RD)
    torch.testing.assert_close(whole_RF, expected_RF, rtol=1e-4, atol=1e-4)
    for num_threads in (1, 2, 3):
        set_threads(num_threads)
        for num_rows in NUMS_ROWS:
            assert torch.equal(packed(x_RD[:num_rows]), whole_RF[:num_rows])


@pytest.mark.parametrize("is_packed", [False, True], ids=["as stored", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_network_gives_the_obvious_answer_for_any_rows(
    shape: tuple[int, int], dtype: torch.dtype, is_packed: bool, set_threads: Callable[[int], None]
) -> None:
    width, hidden = shape
    weights = ExpertWeights(
        gate_DF=random(width, hidden, dtype=dtype) / 16,
        up_DF=random(width, hidden, dtype=dtype) / 16,
        down_FD=random(hidden, width, dtype=dtype) / 16,
    )
    network = packed_network(weights) if is_packed else network_of(weights)
    x_RD = random(40, width, dtype=dtype)
    whole_RD = run(network, x_RD)
    torch.testing.assert_close(whole_RD.float(), obvious(weights, x_RD), rtol=2e-2, atol=2e-3)
    for num_threads in (1, 2, 3):
        set_threads(num_threads)
        for num_rows in NUMS_ROWS:
            assert torch.equal(run(network, x_RD[:num_rows]), whole_RD[:num_rows])


def test_packed_and_stored_weights_give_the_same_bits() -> None:
    weights = ExpertWeights(gate_DF=random(300, 500), up_DF=random(300, 500), down_FD=random(500, 300))
    x_RD = random(23, 300)
    assert torch.equal(run(network_of(weights), x_RD), run(packed_network(weights), x_RD))


def test_a_value_that_is_not_finite_stays_in_its_row() -> None:
    weights = ExpertWeights(gate_DF=random(64, 64), up_DF=random(64, 64), down_FD=random(64, 64))
    x_RD = random(9, 64)
    expected_RD = run(network_of(weights), x_RD)
    x_RD[4, 7] = float("nan")
    found_RD = run(network_of(weights), x_RD)
    assert found_RD[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(found_RD[others], expected_RD[others])


@pytest.mark.parametrize("sizes", [[70], [9, 1, 30, 1]], ids=str)
@pytest.mark.parametrize("preset", ["scout", "maverick", "topk2"])
def test_the_decoder_gives_the_logits_of_the_obvious_one(preset: str, sizes: list[int], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, preset))
    obvious_TV = Runner.load(checkpoint, load=load_obvious).in_chunks(TOKEN_IDS, sizes)
    torch.testing.assert_close(Runner.load(checkpoint).in_chunks(TOKEN_IDS, sizes), obvious_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("field", ["has_rope", "has_qk_norm", "has_temperature"])
def test_each_rule_of_attention_is_heeded(field: str, tmp_path: Path) -> None:
    """Rotation and QK-norm on layers that have them, the temperature on the others: without one, logits move."""
    runner = Runner.load(Checkpoint.open(make_checkpoint(tmp_path, "scout")))
    honest_TV = runner.in_chunks(TOKEN_IDS, [70])
    assert isinstance(runner.model, CpuLlama4)
    for layer in runner.model.layers:
        setattr(layer.attention._struct, field, 0)
    runner.restart()
    assert (runner.in_chunks(TOKEN_IDS, [70]) - honest_TV).abs().max() > 1e-2


@pytest.mark.parametrize("block_size", [1, 5, 16, 32])
def test_the_size_of_a_page_changes_no_bit(block_size: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout"))
    expected_TV = Runner.load(checkpoint, block_size=16).in_chunks(TOKEN_IDS, [33, 1])
    assert torch.equal(Runner.load(checkpoint, block_size=block_size).in_chunks(TOKEN_IDS, [33, 1]), expected_TV)


def test_a_processor_with_narrow_vectors_gives_the_same_bits(tmp_path: Path) -> None:
    """Workers and hosts of one cluster may have different processors; int8 weights are made on each."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout"))
    formats = ("stored", "int8")
    wide = [Runner.load(checkpoint, weight_format=name).in_chunks(TOKEN_IDS, [33, 1]) for name in formats]
    with computing_with(narrow_passes(AVX2)):
        for name, wide_TV in zip(formats, wide, strict=True):
            assert torch.equal(Runner.load(checkpoint, weight_format=name).in_chunks(TOKEN_IDS, [33, 1]), wide_TV)


def load_obvious(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> Llama4:
    return Llama4(checkpoint.config, Weights(checkpoint, dtype=dtype, device=torch.device(device)))


def run(network: Network, x_RD: Tensor) -> Tensor:
    out_RD = torch.full_like(x_RD, float("nan"))
    run_networks([network], [len(x_RD)], x_RD, out_RD)
    return out_RD


def packed_network(weights: ExpertWeights) -> Network:
    parts = [pack(part.T.contiguous()) for part in (weights.gate_DF, weights.up_DF, weights.down_FD)]
    gate, up, down = (part.strips for part in parts)
    width, hidden = weights.gate_DF.shape
    return Network(gate, up, down, width=width, hidden=hidden, strides=(0, 0))


def obvious(weights: ExpertWeights, x_RD: Tensor) -> Tensor:
    gate_RF, up_RF = x_RD.double() @ weights.gate_DF.double(), x_RD.double() @ weights.up_DF.double()
    return (torch.nn.functional.silu(gate_RF) * up_RF @ weights.down_FD.double()).float()
