"""Quantised experts compute what their format means: float8 with rounded rows, integers with rows as they are."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from llama4_dist.checkpoint.quantised import QuantisedExpertWeights, QuantisedLinear
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.scheme import Number, Scheme
from llama4_dist.errors import ConfigError
from llama4_dist.model.cpu.expanded import ExpandedExperts
from llama4_dist.model.cpu.feed_forward import run_networks
from llama4_dist.model.cpu.quantised import expanded_network, numbers_in_panels, stored_network
from llama4_dist.model.expert import Experts
from llama4_dist.model.expert_store import ExpertStore
from llama4_dist.model.load import load_model
from llama4_dist.model.quantised_expert import apply_quantised_expert, rounded_to_float8
from llama4_dist.native import threads
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner, all_experts
from tests.model.references import load_reference, reference_logits
from tests.native.compiler import needs_compiler
from tests.quantised_checkpoints import ALL, PLAIN, ROWS, make_quantised

FORMS = [*ALL, *PLAIN]
D, F = 64, 96
TOKEN_IDS = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(0)).tolist()
X_RD = torch.randn(40, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    yield threads.set_count
    threads.set_count(1)


def in_float64(x_RD: Tensor, weights: QuantisedExpertWeights) -> Tensor:
    """Write the meaning out, with no line of what is tested but the stored tensors."""
    is_float8 = weights.scheme.number is Number.FLOAT8

    def rounded(rows: Tensor) -> Tensor:
        if not is_float8:
            return rows
        scale = (rows.float().abs().amax(1, keepdim=True) / 448).double()
        return (rows.float() / scale.float()).to(torch.float8_e4m3fn).double() * scale

    def weight(linear: QuantisedLinear) -> Tensor:
        scales = linear.scales_FG.double().repeat_interleave(linear.width // linear.scales_FG.shape[1], dim=1)
        return linear.numbers().double() * scales

    gate, up, down = (weight(linear) for linear in weights.linears())
    rows = rounded(x_RD.double())
    gate_RF, up_RF = rows @ gate.T, rows @ up.T
    inner_RF = gate_RF / (1 + (-gate_RF).exp()) * up_RF
    return rounded(inner_RF) @ down.T


def quantised_expert(path: Path, layer: int = 1, expert: int = 3, *cut: int) -> QuantisedExpertWeights:
    weights = Checkpoint.open(path).expert(layer, expert, *cut)
    assert isinstance(weights, QuantisedExpertWeights)
    return weights


def answer(experts: Experts, groups: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Tensor:
    out_RD = torch.full((sum(number for _, number in groups), D), math.nan, dtype=dtype)
    experts(1, groups, X_RD[: len(out_RD)].to(dtype), out_RD)
    return out_RD


def held(path: Path, dtype: torch.dtype = torch.float32, **options: int) -> Experts:
    checkpoint = Checkpoint.open(path)
    weights = {(1, expert): checkpoint.expert(1, expert) for expert in range(8)}
    return Experts(weights, width=D, dtype=dtype, device="cpu", **options)


def test_rows_are_rounded_as_compressed_tensors_rounds_them() -> None:
    args = QuantizationArgs(**ROWS)
    scale, zero_point = compute_dynamic_scales_and_zp(value=X_RD, args=args, module=nn.Linear(1, 1))
    expected_RD = fake_quantize(x=X_RD, scale=scale, zero_point=zero_point, args=args)
    assert torch.equal(rounded_to_float8(X_RD), expected_RD)
    assert torch.equal(rounded_to_float8(torch.zeros(2, D)), torch.zeros(2, D))


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_computes_what_its_format_means(arithmetic: str, form: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path, form)
    expected_RD = in_float64(X_RD, quantised_expert(path))
    found_RD = answer(held(path), [(3, 40)])
    torch.testing.assert_close(found_RD.double(), expected_RD, rtol=0, atol=2e-5)
    reference_RD = torch.empty(40, D, dtype=torch.float64)
    apply_quantised_expert(X_RD.double(), quantised_expert(path), reference_RD)
    torch.testing.assert_close(reference_RD, expected_RD, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_bfloat16_rows_are_those_of_float32_rounded_at_the_end(arithmetic: str, form: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path, form)
    expected_RD = in_float64(X_RD.bfloat16(), quantised_expert(path))
    found_RD = answer(held(path, torch.bfloat16), [(3, 40)], torch.bfloat16)
    torch.testing.assert_close(found_RD.double(), expected_RD, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("scale_rank", [1, 2])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float8_as_maverick_stores_it_is_that_of_float64(
    arithmetic: str, scale_rank: int, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    """Experts unfused, every second layer dense, one MoE layer ignored; layers 0 to 2 of 4, whole network by network."""

    def edit(scale: Tensor) -> Tensor:
        return scale.to(scale_dtype) if scale_rank == 2 else scale.to(scale_dtype).flatten()

    path = make_quantised(tmp_path, "fp8", "maverick", ignored_layers=(3,), edit_scale=edit, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(path)
    x_RD = torch.randn(9, D, generator=torch.Generator().manual_seed(2))
    for expert in (0, 17, 31):
        experts = Experts({(1, expert): checkpoint.expert(1, expert)}, width=D, dtype=torch.float32, device="cpu")
        out_RD = torch.empty(9, D)
        experts(1, [(expert, 9)], x_RD, out_RD)
        expected_RD = in_float64(x_RD, quantised_expert(path, 1, expert))
        torch.testing.assert_close(out_RD.double(), expected_RD, rtol=0, atol=2e-5)
    ignored = checkpoint.expert(3, 0)
    assert not isinstance(ignored, QuantisedExpertWeights)
    twin = Checkpoint.open(make_checkpoint(tmp_path / "twin", "maverick", dtype=torch.bfloat16))
    assert torch.equal(ignored.down_FD, twin.expert(3, 0).down_FD)
    runner = Runner.load(checkpoint)
    whole_TV = runner.in_chunks(TOKEN_IDS, [70])
    runner.restart()
    assert torch.equal(runner.in_chunks(TOKEN_IDS, [33, 1]), whole_TV)


@pytest.mark.parametrize(("form", "tolerance"), [("fp8", 0.03), ("int8", 2e-4), ("int4", 2e-4), ("int8-plain", 2e-4)])
def test_logits_are_those_of_transformers_with_compressed_tensors(form: str, tolerance: float, tmp_path: Path) -> None:
    """Of float8 only most: a sum that lies between two float8 numbers falls to either side, and moves what follows."""
    path = make_quantised(tmp_path, form)
    expected_TV = reference_logits(load_reference(path, "scout"), TOKEN_IDS)
    found_TV = Runner.load(Checkpoint.open(path)).in_chunks(TOKEN_IDS, [70])
    moved_T = (found_TV - expected_TV).abs().amax(1)
    assert moved_T.median() < tolerance
    if form != "fp8":
        assert moved_T.max() < tolerance


@needs_compiler
@pytest.mark.parametrize("form", ["fp8", "int8", "int4", "int4-channel"])
def test_a_rows_bits_depend_on_nothing_but_the_row(
    form: str, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    experts = held(make_quantised(tmp_path, form))
    alone = [answer(experts, [(3, number)]) for number in (1, 2, 7, 40)]
    for number, out_RD in zip((1, 2, 7, 40), alone, strict=True):
        assert torch.equal(out_RD, alone[-1][:number])
    for num_threads in (1, 2, 3):
        set_threads(num_threads)
        both = answer(experts, [(3, 13), (0, 20)])
        assert torch.equal(both[:13], alone[-1][:13])


@needs_compiler
def test_every_float8_number_is_multiplied_as_itself() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    scales_FG = torch.full((254, 1), 0.5)
    for width in (1, 3):
        stored = every[:, None].view(torch.uint8).expand(-1, width).contiguous().view(torch.float8_e4m3fn)
        linear = QuantisedLinear(scheme=Scheme(number=Number.FLOAT8), width=width, stored=stored, scales_FG=scales_FG)
        x_RD = torch.zeros(9, width)
        x_RD[:, -1] = 1
        assert torch.equal(numbers_in_panels(linear)(x_RD), (every.float() * 0.5).expand(9, -1))


@needs_compiler
def test_rows_of_every_size_round_to_the_nearest_float8_in_the_native_pass() -> None:
    """A network that adds nothing of its own: gate saturates, up and down are the identity times powers of two."""
    width = 32
    identity = torch.eye(width).to(torch.float8_e4m3fn)
    ones_F1 = torch.ones(width, 1)
    scheme = Scheme(number=Number.FLOAT8)

    def linear(stored: Tensor, scales: Tensor = ones_F1) -> QuantisedLinear:
        return QuantisedLinear(scheme=scheme, width=width, stored=stored, scales_FG=scales)

    weights = QuantisedExpertWeights(gate_FD=linear(identity), up_FD=linear(identity), down_DF=linear(identity))
    generator = torch.Generator().manual_seed(3)
    x_RD = torch.randn(200, width, generator=generator) * torch.randn(200, width, generator=generator).mul(4).exp()
    x_RD[0] = 0
    out_RD = torch.empty_like(x_RD)
    run_networks([stored_network(weights)], [len(x_RD)], x_RD, out_RD)
    rows = rounded_to_float8(x_RD)
    expected_RD = rounded_to_float8(rows / (1 + (-rows).exp()) * rows)
    is_equal = torch.isclose(out_RD, expected_RD, rtol=1e-6, atol=0)
    assert is_equal.double().mean() > 0.999  # the sigmoid's own last bit decides the rest


@needs_compiler
def test_a_float8_nan_is_seen_in_its_output_and_in_no_other(tmp_path: Path) -> None:
    linear = quantised_expert(make_quantised(tmp_path, "fp8")).up_FD
    numbers = linear.stored.clone()
    numbers.view(torch.uint8)[5, 9] = 0xFF
    broken = QuantisedLinear(scheme=linear.scheme, width=linear.width, stored=numbers, scales_FG=linear.scales_FG)
    assert numbers_in_panels(broken)(X_RD).isnan().any(0).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_slices_of_an_expert_add_up_to_it(arithmetic: str, form: str, tmp_path: Path) -> None:
    """Of float8 to the rounding of inner rows, whose scale is each slice's own."""
    path = make_quantised(tmp_path, form)
    whole_RD = answer(held(path), [(3, 40)])
    parts_RD = torch.zeros_like(whole_RD)
    checkpoint = Checkpoint.open(path)
    for start, stop in ((0, 32), (32, 96)):
        experts = Experts({(1, 3): checkpoint.expert(1, 3, start, stop)}, width=D, dtype=torch.float32, device="cpu")
        parts_RD += answer(experts, [(3, 40)])
        expected_RD = in_float64(X_RD, quantised_expert(path, 1, 3, start, stop))
        torch.testing.assert_close(answer(experts, [(3, 40)]).double(), expected_RD, rtol=0, atol=2e-5)
    tolerance = 0.1 if form == "fp8" else 2e-5
    torch.testing.assert_close(parts_RD, whole_RD, rtol=0, atol=tolerance)


@needs_compiler
def test_expanded_experts_stay_within_their_bound(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "int4")
    size = expanded_network(quantised_expert(path)).num_bytes
    groups = [(expert, 5) for expert in range(8)]
    unbounded_RD = answer(held(path), groups)
    for capacity in (0, size, 3 * size, 8 * size):
        experts = held(path, expanded_bytes=capacity)
        for _ in range(2):
            assert torch.equal(answer(experts, groups), unbounded_RD)
        assert experts._expanded.num_bytes == max(capacity, size)
    experts.drop([(1, 7), (1, 6)])
    assert experts._expanded.num_bytes == 6 * size


@needs_compiler
def test_an_expanded_expert_is_made_once_while_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[QuantisedExpertWeights] = []

    def note(weights: QuantisedExpertWeights) -> object:
        made.append(weights)
        return expanded_network(weights)

    monkeypatch.setattr("llama4_dist.model.cpu.expanded.expanded_network", note)
    path = make_quantised(tmp_path, "int4")
    first, second, third = (quantised_expert(path, 1, expert) for expert in range(3))
    kept = ExpandedExperts(2 * expanded_network(first).num_bytes)
    for weights in (first, second, first, third, first, second):  # the third pushes the second out, not the first
        kept(weights)
    assert [id(weights) for weights in made] == [id(weights) for weights in (first, second, third, second)]


@needs_compiler
def test_experts_of_several_forms_are_held_side_by_side(tmp_path: Path) -> None:
    """An ignored expert beside quantised ones: each is computed as what it is."""
    quantised = Checkpoint.open(make_quantised(tmp_path / "q", "fp8"))
    plain = Checkpoint.open(make_checkpoint(tmp_path / "p", "scout", layout="per_expert"))
    weights = {(1, 0): quantised.expert(1, 0), (1, 1): plain.expert(1, 1), (1, 2): quantised.expert(1, 2)}
    mixed = Experts(weights, width=D, dtype=torch.float32, device="cpu")
    found_RD = answer(mixed, [(0, 4), (1, 5), (2, 6)])
    for expert, part in ((0, slice(0, 4)), (1, slice(4, 9)), (2, slice(9, 15))):
        experts = Experts({(1, expert): weights[1, expert]}, width=D, dtype=torch.float32, device="cpu")
        out_RD = torch.empty(part.stop - part.start, D)
        experts(1, [(expert, len(out_RD))], X_RD[part], out_RD)
        assert torch.equal(found_RD[part], out_RD)


def test_a_store_counts_stored_bytes_and_tells_weights_apart(arithmetic: str, tmp_path: Path) -> None:
    def store(name: str, value: float = 1.0) -> ExpertStore:
        path = make_quantised(tmp_path / name, "int4", edit_scale=lambda scale: scale * value)
        store = ExpertStore(Checkpoint.open(path), dtype=torch.float32, device="cpu")
        store.add([(1, 3)])
        return store

    one, same, other = store("one"), store("same"), store("other", 1.01)
    assert one.bytes_held == Checkpoint.open(tmp_path / "one").expert_bytes(1, 3) < 3 * D * F
    assert one.fingerprint((1, 3)) == same.fingerprint((1, 3)) != other.fingerprint((1, 3))
    one.remove([(1, 3)])
    assert one.bytes_held == 0


def test_weights_that_are_quantised_are_not_rounded_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_quantised(tmp_path, "fp8"))
    message = "weights='int8' would round once more what the checkpoint stores as float8, .*: take 'stored'"
    with pytest.raises(ConfigError, match=message):
        all_experts(checkpoint, torch.float32, "int8")
    with pytest.raises(ConfigError, match=message):
        load_model(checkpoint, dtype=torch.float32, device="cpu", weight_format="int8")
