"""Routed experts by Triton's kernels: the answers of `model.expert`, from memory that is not one stack. Interpreter."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.gpu import experts as experts_module
from llama4_dist.gpu.addressed import AddressedGroups
from llama4_dist.gpu.experts import DeviceExpert, GpuExperts
from llama4_dist.gpu.stream_linear import MAX_ROWS, MIN_ROWS, default_tile
from llama4_dist.model.expert import Experts
from tests.checkpoints import make_checkpoint

D, F, LAYER = 64, 96, 1
X_RD = torch.randn(70, D, generator=torch.Generator().manual_seed(0))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
# Padding rows hold what the memory held before.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", params=["fused", "per_expert"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("scout"), "scout", layout=request.param)
    return Checkpoint.open(path)


def gpu_experts(checkpoint: Checkpoint, experts: range, dtype: torch.dtype = torch.float32) -> GpuExperts:
    held = GpuExperts(width=D, expert_width=F, num_experts=16, dtype=dtype, device="cpu")
    for expert in experts:
        held.put({(LAYER, expert): checkpoint.expert(LAYER, expert)})
    return held


def answer(experts: Experts | GpuExperts, groups: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Tensor:
    num_rows = sum(number for _, number in groups)
    out_RD = torch.full((num_rows, D), float("nan"), dtype=dtype)
    experts(LAYER, groups, X_RD[:num_rows].to(dtype), out_RD)
    return out_RD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [[(3, 1)], [(3, 1), (0, 0), (7, 6), (5, 0), (1, 2)], [(2, 66), (4, 3)]])
def test_answers_are_those_of_the_processor(
    checkpoint: Checkpoint, dtype: torch.dtype, groups: list[tuple[int, int]]
) -> None:
    weights = {(LAYER, expert): checkpoint.expert(LAYER, expert) for expert in range(8)}
    expected_RD = answer(Experts(weights, width=D, dtype=dtype, device="cpu"), groups, dtype)
    found_RD = answer(gpu_experts(checkpoint, range(8), dtype), groups, dtype)
    torch.testing.assert_close(found_RD, expected_RD, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_weights_are_those_that_were_put(checkpoint: Checkpoint) -> None:
    held, stored = gpu_experts(checkpoint, range(3)).weights(LAYER, 2), checkpoint.expert(LAYER, 2)
    for name in ("gate_DF", "up_DF", "down_FD"):
        assert torch.equal(getattr(held, name), getattr(stored, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_two_widths_stand_beside_each_other_and_the_narrower_is_filled_up(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    """Units 0 and 1 of an expert: 64 and 32 of its 96 columns."""
    slices = {(LAYER, 0): checkpoint.expert(LAYER, 5, 0, 64), (LAYER, 1): checkpoint.expert(LAYER, 5, 64, 96)}
    held = GpuExperts(width=D, expert_width=64, num_experts=32, dtype=dtype, device="cpu")
    held.put(slices)
    assert held.weights(LAYER, 1).down_FD[32:].abs().max() == 0
    groups = [(0, 2), (1, 3)]
    expected_RD = answer(Experts(slices, width=D, dtype=dtype, device="cpu"), groups, dtype)
    torch.testing.assert_close(answer(held, groups, dtype), expected_RD, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_an_expert_that_comes_or_goes_moves_no_other(checkpoint: Checkpoint) -> None:
    held = gpu_experts(checkpoint, range(4))
    before, places = answer(held, [(1, 3)]), held._held[LAYER, 1].down.data_ptr()
    held.drop([(LAYER, 0), (LAYER, 2)])
    held.put({(LAYER, 9): checkpoint.expert(LAYER, 9)})
    assert held.holds == {(LAYER, 1), (LAYER, 3), (LAYER, 9)}
    assert held._held[LAYER, 1].down.data_ptr() == places
    assert torch.equal(answer(held, [(1, 3)]), before)
    with pytest.raises(KeyError):
        answer(held, [(0, 1)])


def test_two_threads_may_ask_at_once(checkpoint: Checkpoint) -> None:
    held = gpu_experts(checkpoint, range(4))
    expected = {expert: answer(held, [(expert, 5)]) for expert in range(2)}
    wrong: list[int] = []

    def ask(expert: int) -> None:
        for _ in range(3):
            if not torch.equal(answer(held, [(expert, 5)]), expected[expert]):
                wrong.append(expert)

    threads = [threading.Thread(target=ask, args=(expert,)) for expert in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_all_that_calls_launch_is_compiled_before_the_first_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """At Scout's shape; a kernel is another one for another tile, and for another power of two of rows or groups."""
    kinds: set[tuple[object, ...]] = set()

    def note(
        x_RD: Tensor, addresses: Tensor, groups: AddressedGroups, *, num_columns: int, gated: bool = False
    ) -> Tensor:
        if groups.max_rows > MAX_ROWS:
            kinds.add((gated, groups.num_groups, len(x_RD) % 16))
        else:
            tile = default_tile(x_RD, gated, num_columns * groups.num_groups)
            kinds.add((gated, tile, max(MIN_ROWS, 1 << (groups.max_rows - 1).bit_length())))
        return x_RD.new_empty(len(x_RD), num_columns)

    monkeypatch.setattr(experts_module, "multiply_addressed", note)
    held = GpuExperts(width=5120, expert_width=8192, num_experts=40, dtype=torch.bfloat16, device="cpu")
    held._warm_up()
    warm, expert = kinds.copy(), DeviceExpert(gate_up=torch.empty(0), down=torch.empty(0))
    kinds.clear()
    for num_groups in range(1, 41):
        for num_rows in (1, 2, 16, 17, 33, 64, 65, 200):
            x_RD = torch.empty((num_groups - 1 + num_rows, 5120), dtype=torch.bfloat16)
            held._compute([(expert, num_rows)] + [(expert, 1)] * (num_groups - 1), x_RD, torch.empty_like(x_RD))
    assert kinds == warm


def test_groups_that_do_not_cover_the_rows_are_our_own_bug(checkpoint: Checkpoint) -> None:
    held = gpu_experts(checkpoint, range(1))
    with pytest.raises(AssertionError, match="cover"):
        held(LAYER, [(0, 3)], torch.zeros(4, D), torch.zeros(4, D))
