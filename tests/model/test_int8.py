"""int8 weights: off by half a scale at most, multiplied exactly as what they stand for, with bits that hold."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError
from llama4_dist.model import weight_format
from llama4_dist.model.cpu.feed_forward import Network, quantised_network, run_networks
from llama4_dist.model.cpu.panels import Panels
from llama4_dist.model.cpu.quantise import QuantisationError, quantise
from llama4_dist.model.expert import Experts
from llama4_dist.model.load import arithmetic, load_model
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner
from tests.native.compiler import needs_compiler

pytestmark = needs_compiler

SHAPES = [(64, 96), (100, 37), (1, 1), (300, 1030), (257, 64)]
NUMS_ROWS = [1, 2, 3, 5, 6, 7, 13, 40]
GENERATOR = torch.Generator().manual_seed(0)
TOKEN_IDS = torch.randint(0, 256, (70,), generator=GENERATOR).tolist()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


def quantised(weight_DF: Tensor) -> tuple[Panels, QuantisationError]:
    error = QuantisationError()
    return quantise(weight_DF, error), error


def meant(packed: Panels) -> Tensor:
    """Return the weight that the int8 values stand for, float64 [D, F]."""
    assert packed.scales_F is not None
    values_DF = packed.strips.transpose(0, 1).reshape(packed.num_inputs, -1)[:, : packed.num_outputs]
    return values_DF.double() * packed.scales_F.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_is_off_by_half_of_its_outputs_scale_at_most(shape: tuple[int, int]) -> None:
    weight_DF = random(*shape) * random(shape[1]).exp()  # outputs of very different sizes
    packed, error = quantised(weight_DF)
    assert packed.scales_F is not None
    torch.testing.assert_close(packed.scales_F, weight_DF.abs().amax(0) / 127, rtol=1e-6, atol=0)
    lost_DF = (meant(packed) - weight_DF).abs()
    assert (lost_DF <= packed.scales_F.double() * (0.5 + 1e-5)).all()
    relative_F = lost_DF.norm(dim=0) / weight_DF.double().norm(dim=0)
    assert error.num_outputs == shape[1]
    assert error.worst == pytest.approx(float(relative_F.max()), rel=1e-3, abs=1e-6)
    assert error.mean == pytest.approx(float(relative_F.mean()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layout_and_stored_dtype_do_not_matter_where_the_weights_are_equal(dtype: torch.dtype) -> None:
    weight_DF = random(100, 150, dtype=dtype)
    expected, _ = quantised(weight_DF.float())
    assert expected.scales_F is not None
    both = torch.cat([weight_DF, weight_DF], dim=1)
    for same in (weight_DF, weight_DF.T.contiguous().T, both[:, 150:], weight_DF.float()):
        found, _ = quantised(same)
        assert torch.equal(found.strips, expected.strips)
        assert found.scales_F is not None
        assert torch.equal(found.scales_F, expected.scales_F)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_that_of_the_weight_meant_for_any_rows_and_threads(
    shape: tuple[int, int], set_threads: Callable[[int], None]
) -> None:
    width, num_outputs = shape
    packed, _ = quantised(random(width, num_outputs))
    x_RD = random(40, width)
    whole_RF = packed(x_RD)
    torch.testing.assert_close(whole_RF, (x_RD.double() @ meant(packed)).float(), rtol=1e-5, atol=1e-4)
    for num_threads in (1, 2, 3):
        set_threads(num_threads)
        for num_rows in NUMS_ROWS:
            assert torch.equal(packed(x_RD[:num_rows]), whole_RF[:num_rows])


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_quantise_to_the_same_bytes(num_threads: int, set_threads: Callable[[int], None]) -> None:
    weight_DF = random(300, 1030)
    expected, _ = quantised(weight_DF)
    set_threads(num_threads)
    found, _ = quantised(weight_DF)
    assert torch.equal(found.strips, expected.strips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_network_gives_the_obvious_answer_for_any_rows(
    shape: tuple[int, int], dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    width, hidden = shape
    weights = ExpertWeights(
        gate_DF=random(width, hidden) / 16, up_DF=random(width, hidden) / 16, down_FD=random(hidden, width) / 16
    )
    error = QuantisationError()
    network = quantised_network(weights, error)
    assert error.num_outputs == 2 * hidden + width
    x_RD = random(40, width, dtype=dtype)
    whole_RD = run(network, x_RD)
    gate_DF, up_DF, down_FD = (meant(quantised(part)[0]) for part in (weights.gate_DF, weights.up_DF, weights.down_FD))
    gate_RF, up_RF = x_RD.double() @ gate_DF, x_RD.double() @ up_DF
    expected_RD = (torch.nn.functional.silu(gate_RF) * up_RF @ down_FD).to(dtype)
    torch.testing.assert_close(whole_RD, expected_RD)
    for num_threads in (1, 2):
        set_threads(num_threads)
        for num_rows in NUMS_ROWS:
            assert torch.equal(run(network, x_RD[:num_rows]), whole_RD[:num_rows])


def test_an_output_of_zeros_is_zero_and_the_smallest_numbers_keep_their_sign() -> None:
    smallest = math.ldexp(1.0, -149)
    weight_DF = torch.zeros(4, 3)
    weight_DF[:, 1] = torch.tensor([189.0, -189.0, 1.0, 0.0]) * smallest  # its scale rounds down: 189 would be past 127
    packed, error = quantised(weight_DF)
    assert packed.scales_F is not None
    assert packed.scales_F.tolist() == [0.0, smallest, 0.0]
    assert packed.strips[0, :, 1].tolist() == [127, -127, 1, 0]
    assert packed(torch.ones(1, 4))[0, 0] == 0
    assert error.worst < 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_rows", [1, 9])
def test_a_weight_that_is_no_number_is_not_hidden(value: float, num_rows: int) -> None:
    weight_DF = random(50, 70)
    weight_DF[20, 66] = value
    y_RF = quantised(weight_DF)[0](random(num_rows, 50))
    broken = ~y_RF.isfinite()
    assert broken[:, 66].all()
    assert broken.sum() == num_rows


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("preset", ["scout", "maverick", "dense"])
def test_linears_are_quantised_and_nothing_else(preset: str, layout: str, tmp_path: Path) -> None:
    """Linears that lie on the grid of int8 lose nothing, so the logits are the stored ones unless more is touched."""
    path = make_checkpoint(tmp_path, preset, layout=layout)
    put_linears_on_the_grid(path, and_embedding=preset == "dense")  # there it is the head too
    checkpoint = Checkpoint.open(path)
    int8_TV = Runner.load(checkpoint, weight_format="int8").in_chunks(TOKEN_IDS, [33, 1])
    stored_TV = Runner.load(checkpoint).in_chunks(TOKEN_IDS, [33, 1])
    torch.testing.assert_close(int8_TV, stored_TV, rtol=0, atol=1e-4)


def test_weights_off_the_grid_move_the_logits_a_little(tmp_path: Path) -> None:
    """Without routers: among experts of random weights another choice would move them a lot."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "dense"))
    moved_TV = Runner.load(checkpoint, weight_format="int8").in_chunks(TOKEN_IDS, [70])
    moved_TV -= Runner.load(checkpoint).in_chunks(TOKEN_IDS, [70])
    assert 1e-3 < moved_TV.abs().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_has_its_bits_in_any_chunks_and_any_batch(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout", dtype=dtype))
    runner = Runner.load(checkpoint, dtype=dtype, num_sequences=9, weight_format="int8")
    alone_TV = runner.in_chunks(TOKEN_IDS, [40, 1])
    for sizes in ([70], [3, 50, 7], [11]):
        runner.restart()
        assert torch.equal(runner.in_chunks(TOKEN_IDS, sizes), alone_TV)
    runner.restart()
    prompts = [TOKEN_IDS[index : index + 5 + 6 * index] for index in range(9)]
    prompts[4] = TOKEN_IDS[:40]
    logits = [runner.run(list(enumerate(prompts)))[4]]
    logits += [runner.run([(index, [token]) for index in range(9)])[4] for token in TOKEN_IDS[40:]]
    assert torch.equal(torch.cat(logits), alone_TV)


def test_loading_says_what_was_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "scout"))
    with caplog.at_level(logging.INFO):
        load_model(checkpoint, dtype=torch.float32, device="cpu", weight_format="int8")
    (line,) = [record.getMessage() for record in caplog.records if "weights_quantised" in record.getMessage()]
    assert "part=attention_side outputs=" in line
    fields = dict(field.split("=") for field in line.split()[1:])
    assert 0 < float(fields["mean"]) < float(fields["worst"]) < 0.02


def test_where_int8_cannot_be_computed_it_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        Experts({}, width=8, dtype=dtype, device=device, weight_format=name)

    hold("int8")
    with pytest.raises(ConfigError, match="weights='int4' is none of stored, int8"):
        hold("int4")
    with pytest.raises(ConfigError, match="weights='int8' is for processors, the device is cuda:1"):
        hold("int8", device="cuda:1")
    with pytest.raises(ConfigError, match=r"weights='int8' .* not float16: install g\+\+"):
        hold("int8", dtype=torch.float16)
    monkeypatch.setattr(weight_format, "is_native", lambda dtype, device: False)
    with pytest.raises(ConfigError, match="leave LLAMA4_DIST_NATIVE=0 out"):
        hold("int8")
    hold("stored")


def test_int8_is_an_arithmetic_of_its_own() -> None:
    assert arithmetic(torch.float32, "cpu") != arithmetic(torch.float32, "cpu", "int8")


def run(network: Network, x_RD: Tensor) -> Tensor:
    out_RD = torch.full_like(x_RD, float("nan"))
    run_networks([network], [len(x_RD)], x_RD, out_RD)
    return out_RD


def put_linears_on_the_grid(path: Path, *, and_embedding: bool) -> None:
    """Round the linears of a checkpoint to what int8 can say; experts of one matrix are [E, inputs, outputs]."""
    kept = ("router",) if and_embedding else ("router", "embed_tokens")
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if tensor.ndim > 1 and not any(part in name for part in kept):
                scale = tensor.abs().amax(-1 if tensor.ndim == 2 else 1, keepdim=True) / 127
                tensors[name] = (tensor / scale).round() * scale
        save_file(tensors, shard, metadata={"format": "pt"})
