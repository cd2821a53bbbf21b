"""Native passes on quantised experts: every number as itself, bits that hold, memory that stays within its bound."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.quantised import QuantisedExpertWeights, QuantisedLinear
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.scheme import Number, Scheme
from llama4_dist.model.cpu.expanded import ExpandedExperts
from llama4_dist.model.cpu.feed_forward import Network, run_networks
from llama4_dist.model.cpu.quantised import expanded_network, numbers_in_panels, stored_network
from llama4_dist.model.expert import Experts
from llama4_dist.model.quantised_expert import rounded_to_float8
from tests.checkpoints import make_checkpoint
from tests.model.quantised_experts import X_RD, D, answer, held, quantised_expert
from tests.native.compiler import needs_compiler
from tests.quantised_checkpoints import ALL, PLAIN, make_quantised

FORMS = [*ALL, *PLAIN]
pytestmark = needs_compiler


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


def test_a_float8_nan_is_seen_in_its_output_and_in_no_other(tmp_path: Path) -> None:
    linear = quantised_expert(make_quantised(tmp_path, "fp8")).up_FD
    numbers = linear.stored.clone()
    numbers.view(torch.uint8)[5, 9] = 0xFF
    broken = QuantisedLinear(scheme=linear.scheme, width=linear.width, stored=numbers, scales_FG=linear.scales_FG)
    assert numbers_in_panels(broken)(X_RD).isnan().any(0).nonzero().flatten().tolist() == [5]


def test_expanded_experts_stay_within_their_bound(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "int4")
    size = expanded_network(quantised_expert(path)).num_bytes
    groups = [(expert, 5) for expert in range(8)]
    unbounded_RD = answer(held(path), groups)
    for capacity in (0, size, 3 * size, 8 * size):
        experts = held(path, expanded_bytes=capacity)
        for _ in range(2):
            assert torch.equal(answer(experts, groups), unbounded_RD)
        assert experts.bytes_expanded == max(capacity, size)
    experts.drop([(1, 7), (1, 6)])
    assert experts.bytes_expanded == 6 * size


def test_an_expanded_expert_is_made_once_while_it_stays(tmp_path: Path) -> None:
    made: list[QuantisedExpertWeights] = []

    def note(weights: QuantisedExpertWeights) -> Network:
        made.append(weights)
        return expanded_network(weights)

    path = make_quantised(tmp_path, "int4")
    first, second, third = (quantised_expert(path, 1, expert) for expert in range(3))
    kept = ExpandedExperts(2 * expanded_network(first).num_bytes)
    for weights in (first, second, first, third, first, second):  # the third pushes the second out, not the first
        kept(weights, note)
    assert [id(weights) for weights in made] == [id(weights) for weights in (first, second, third, second)]


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
