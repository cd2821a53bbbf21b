"""Quantised experts compute what their format means: float8 with rounded rows, integers with rows as they are."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError
from llama4_dist.model.expert import Experts
from llama4_dist.model.expert_store import ExpertStore
from llama4_dist.model.load import load_model
from llama4_dist.model.quantised_expert import apply_quantised_expert, rounded_to_float8
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner, all_experts
from tests.model.quantised_experts import TOKEN_IDS, X_RD, D, answer, held, in_float64, quantised_expert
from tests.model.references import load_reference, reference_logits
from tests.plain_experts import plain
from tests.quantised_checkpoints import ALL, PLAIN, ROWS, make_quantised

FORMS = [*ALL, *PLAIN]


def test_rows_are_rounded_as_compressed_tensors_rounds_them() -> None:
    args = QuantizationArgs(**ROWS)
    rows_1RD = X_RD[None]  # with a batch in front, or all rows have one scale
    scale, zero_point = compute_dynamic_scales_and_zp(value=rows_1RD, args=args, module=nn.Linear(1, 1))
    expected_RD = fake_quantize(x=rows_1RD, scale=scale, zero_point=zero_point, args=args)[0]
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
    """Experts unfused, every second layer dense, one MoE layer of two ignored."""

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
    ignored = plain(checkpoint.expert(3, 0))
    assert not isinstance(ignored, QuantisedExpertWeights)
    twin = Checkpoint.open(make_checkpoint(tmp_path / "twin", "maverick", dtype=torch.bfloat16))
    assert torch.equal(ignored.down_FD, plain(twin.expert(3, 0)).down_FD)


@pytest.mark.parametrize("form", ["int8", "int8-groups", "int4", "int4-channel"])
def test_logits_are_those_of_transformers_with_compressed_tensors(form: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path, form)
    expected_TV = reference_logits(load_reference(path, "scout"), TOKEN_IDS)
    found_TV = Runner.load(Checkpoint.open(path)).in_chunks(TOKEN_IDS, [70])
    torch.testing.assert_close(found_TV, expected_TV, rtol=0, atol=2e-4)


def test_float8_logits_are_those_of_transformers_with_compressed_tensors(tmp_path: Path) -> None:
    """One token at a time: of rows without a batch compressed-tensors 0.20 takes one scale for all, not one for each.

    A sum that lies between two float8 numbers may fall to either side, so a few tokens differ by such a step.
    """
    path = make_quantised(tmp_path, "fp8")
    reference, runner = load_reference(path, "scout"), Runner.load(Checkpoint.open(path))
    moved = []
    for token_id in TOKEN_IDS[:40]:
        runner.restart()
        (found_TV,) = runner.run([(0, [token_id])])
        moved.append(float((found_TV - reference_logits(reference, [token_id])).abs().max()))
    assert sorted(moved)[30] < 2e-4
    assert max(moved) < 0.3


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


def test_a_store_counts_stored_bytes_and_tells_weights_apart(arithmetic: str, tmp_path: Path) -> None:
    def store(name: str, value: float = 1.0) -> ExpertStore:
        path = make_quantised(tmp_path / name, "int4", edit_scale=lambda scale: scale * value)
        store = ExpertStore(Checkpoint.open(path), dtype=torch.float32, device="cpu")
        store.add([(1, 3)])
        return store

    one, same, other = store("one"), store("same"), store("other", 1.01)
    assert one.bytes_held == sum(
        part.numel() * part.itemsize for part in quantised_expert(tmp_path / "one", 1, 3).tensors()
    )
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


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_a_sequence_has_its_bits_in_any_chunks(arithmetic: str, form: str, tmp_path: Path) -> None:
    runner = Runner.load(Checkpoint.open(make_quantised(tmp_path, form, "maverick")), num_sequences=2)
    alone_TV = runner.in_chunks(TOKEN_IDS, [70])
    for sizes in ([33, 1], [3, 50, 7], [11]):
        runner.restart()
        assert torch.equal(runner.in_chunks(TOKEN_IDS, sizes), alone_TV)
