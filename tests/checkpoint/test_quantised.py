"""Quantised checkpoints: every form is read as compressed-tensors reads it, and what is damaged is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4_dist.checkpoint.config_file import CONFIG
from llama4_dist.checkpoint.describe import describe
from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights, QuantisedLinear, pack, unpack
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.scheme import Number, Scheme, parse_scheme, scheme_json
from llama4_dist.errors import CheckpointError
from tests.checkpoint.shards import edit_header
from tests.checkpoints import make_checkpoint
from tests.quantised_checkpoints import ALL, PLAIN, decompress, edit_config, make_quantised, stored_tensors

EXPERT = "model.layers.1.feed_forward.experts.3"
FORMS = [*ALL, *PLAIN]


def quantised_expert(path: Path, *cut: int) -> QuantisedExpertWeights:
    weights = Checkpoint.open(path).expert(1, 3, *cut)
    assert isinstance(weights, QuantisedExpertWeights)
    return weights


def parts_of(path: Path, linear: str) -> dict[str, Tensor]:
    prefix = f"{EXPERT}.{linear}."
    return {name.removeprefix(prefix): t for name, t in stored_tensors(path).items() if name.startswith(prefix)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 37, 64, 96])
def test_packing_is_that_of_compressed_tensors(bits: int, width: int) -> None:
    number = Number.INT4 if bits == 4 else Number.INT8
    half = 1 << (bits - 1)
    numbers_FD = torch.randint(-half, half, (5, width), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack(numbers_FD, number)
    assert torch.equal(packed, pack_to_int32(numbers_FD, bits))
    assert torch.equal(unpack(packed.view(torch.uint8), number)[:, :width], numbers_FD)


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_is_read_as_compressed_tensors_reads_it(form: str, tmp_path: Path) -> None:
    path = make_quantised(tmp_path, form)
    weights = quantised_expert(path)
    for name, linear in zip(("gate_proj", "up_proj", "down_proj"), weights.linears(), strict=True):
        assert torch.equal(linear.dequantise(), decompress(parts_of(path, name), form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [(0, 32), (32, 96), (64, 96)])
def test_a_slice_is_that_part_of_the_whole(form: str, cut: tuple[int, int], tmp_path: Path) -> None:
    path, part = make_quantised(tmp_path, form), slice(*cut)
    whole, found = quantised_expert(path), quantised_expert(path, *cut)
    assert torch.equal(found.gate_FD.dequantise(), whole.gate_FD.dequantise()[part])
    assert torch.equal(found.up_FD.dequantise(), whole.up_FD.dequantise()[part])
    assert torch.equal(found.down_DF.dequantise(), whole.down_DF.dequantise()[:, part])


@pytest.mark.parametrize(("form", "unit"), [("int4", 32), ("int8-groups", 32), ("int4-channel", 2)])
def test_a_cut_through_a_group_is_refused_with_where_it_may_be(form: str, unit: int, tmp_path: Path) -> None:
    path = make_quantised(tmp_path, form)
    for cut in ((0, 31), (33, 96)):
        with pytest.raises(ValueError, match=f"multiples of {unit}, or the end, 96"):
            quantised_expert(path, *cut)


@pytest.mark.parametrize("shape", [(96,), (96, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_scales_may_have_either_rank_and_any_float(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    def edit(scale: Tensor) -> Tensor:
        return scale.to(dtype).view(-1, *shape[1:])

    path = make_quantised(tmp_path, "fp8", edit_scale=edit)
    parts = parts_of(path, "up_proj")
    assert (parts["weight_scale"].shape, parts["weight_scale"].dtype) == (shape, dtype)
    expected_FD = parts["weight"].float() * parts["weight_scale"].float().view(-1, 1)
    assert torch.equal(quantised_expert(path).up_FD.dequantise(), expected_FD)


def test_what_is_quantised_is_told_tensor_by_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_quantised(tmp_path, "fp8", ignored_layers=(0, 3)))
    kinds = [type(checkpoint.expert(layer, 5)) for layer in range(4)]
    assert kinds == [ExpertWeights, QuantisedExpertWeights, QuantisedExpertWeights, ExpertWeights]
    plain = Checkpoint.open(make_checkpoint(tmp_path / "plain", "scout"))
    assert checkpoint.num_parameters == plain.num_parameters
    assert describe(checkpoint).quantisation == "float8, a scale for each output"
    assert describe(checkpoint).num_quantised == 2 * 16 * 3
    floats, numbers = checkpoint.expert_formats
    assert floats.slice_bytes(64, 96) == 3 * 64 * 96 * 4
    assert numbers.slice_bytes(64, 96) == 3 * 64 * 96 + 4 * (96 + 96 + 64)
    checkpoint.verify()


def test_a_quantised_linear_outside_the_experts_is_read_as_its_values(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "int4")
    name = "model.layers.2.self_attn.q_proj"
    weight = move_linear(path, name)
    checkpoint = Checkpoint.open(path)
    assert torch.equal(checkpoint.tensor(f"{name}.weight"), weight)


def move_linear(path: Path, name: str) -> Tensor:
    """Quantise linear `name` of an int4 checkpoint by hand: every weight becomes ±3 or 0 times 0.5."""
    rows, columns = 64, 64
    numbers = (torch.arange(rows * columns).view(rows, columns) % 7 - 3).to(torch.int8)
    replace(
        path,
        {
            f"{name}.weight": None,
            f"{name}.weight_packed": pack_to_int32(numbers, 4),
            f"{name}.weight_scale": torch.full((rows, columns // 32), 0.5),
            f"{name}.weight_shape": torch.tensor([rows, columns]),
        },
    )
    return numbers.float() * 0.5


def replace(path: Path, changes: dict[str, Tensor | None]) -> None:
    """Put, replace and remove (None) tensors, all in the file that holds the first one; the index follows."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    file = index["weight_map"][next(iter(changes))]
    tensors = load_file(path / file)
    for name, tensor in changes.items():
        index["weight_map"].pop(name, None)
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
            index["weight_map"][name] = file
    save_file(tensors, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def with_scale(edit: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        name = f"{EXPERT}.down_proj.weight_scale"
        replace(path, {name: edit(stored_tensors(path)[name])})

    return damage


def put(value: float) -> Callable[[Tensor], Tensor]:
    def edit(scale: Tensor) -> Tensor:
        scale[7] = value
        return scale

    return edit


def set_part(part: str, value: Tensor | None) -> Callable[[Path], None]:
    return lambda path: replace(path, {f"{EXPERT}.gate_proj.{part}": value})


DAMAGE_AT_OPEN: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("fp8", "missing scale", with_scale(lambda s: None), r"down_proj.weight_scale' is missing beside .*download"),
    ("fp8", "short scale", with_scale(lambda s: s[:-1]), r"has shape \[63, 1\]; \[64, 1\] or \[64\] is expected"),
    ("fp8", "rank", with_scale(lambda s: s[None]), r"has shape \[1, 64, 1\]"),
    ("fp8", "scale dtype", with_scale(lambda s: s.double()), "is F64; a scale is one of F32, BF16, F16"),
    ("int4", "groups", with_scale(lambda s: s[:, :1]), r"has shape \[64, 1\]; \[64, 3\] is expected"),
    ("int4", "no shape", set_part("weight_shape", None), "gate_proj.weight_shape' is missing beside"),
    ("int4", "float shape", set_part("weight_shape", torch.ones(2)), r"is F32 \[2\]; two integers"),
    ("int4", "words", set_part("weight_packed", torch.zeros(96, 9, dtype=torch.int32)), r"\[96, 9\]; \[96, 8\]"),
    ("int4", "word dtype", set_part("weight_packed", torch.zeros(96, 8)), "is F32; quantization_config calls for I32"),
    ("fp8", "number dtype", set_part("weight", torch.zeros(96, 64, dtype=torch.int8)), "is I8; .* calls for F8_E4M3"),
    ("fp8", "no scheme", lambda p: edit_config(p, lambda c: c.pop("quantization_config")), "no quantization_config"),
    (
        "int4",
        "group size",
        lambda p: edit_config(p, lambda c: weights_of(c).update(group_size=40)),
        "64 inputs do not divide into groups of 40; .*group_size does not fit",
    ),
]


def weights_of(content: dict[str, Any]) -> dict[str, Any]:
    weights: dict[str, Any] = content["quantization_config"]["config_groups"]["group_0"]["weights"]
    return weights


@pytest.mark.parametrize(("form", "what", "damage", "message"), DAMAGE_AT_OPEN, ids=[d[1] for d in DAMAGE_AT_OPEN])
def test_what_does_not_fit_is_refused_when_the_checkpoint_is_opened(
    form: str, what: str, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    damage(make_quantised(tmp_path, form))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.file.startswith("model-0000")
    assert caught.value.tensor


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_scale_that_no_quantiser_writes_is_refused_when_it_is_read(form: str, value: float, tmp_path: Path) -> None:
    path = make_quantised(tmp_path, form)
    with_scale(put(value))(path)
    checkpoint = Checkpoint.open(path)  # reads no weight
    message = rf"down_proj.weight_scale' holds the scale {value:g} at \[7, 0\]; scales are positive and finite"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.expert(1, 3)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify()
    checkpoint.expert(1, 4)


def test_a_stated_shape_that_lies_is_refused(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "int4")
    set_part("weight_shape", torch.tensor([64, 96]))(path)
    with pytest.raises(CheckpointError, match=r"weight_shape' says .*\[96, 64\] is expected"):
        quantised_expert(path)


def test_an_expert_that_is_quantised_in_part_is_refused(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "fp8")
    name = f"{EXPERT}.up_proj"
    replace(path, {f"{name}.weight": torch.zeros(96, 64), f"{name}.weight_scale": None})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' is not quantised, but its expert's other linears are"):
        Checkpoint.open(path)


def test_a_quantised_shard_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "fp8")
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short, download it again"):
        Checkpoint.open(path)


def test_a_float8_nan_is_found_by_verify(tmp_path: Path) -> None:
    path = make_quantised(tmp_path, "fp8")
    numbers = stored_tensors(path)[f"{EXPERT}.gate_proj.weight"].view(torch.uint8)
    numbers[2, 5] = 0xFF
    set_part("weight", numbers.view(torch.float8_e4m3fn))(path)
    with pytest.raises(CheckpointError, match=f"holds nan at element {2 * 64 + 5}"):
        Checkpoint.open(path).verify()


def test_numbers_may_lie_at_any_address(tmp_path: Path) -> None:
    """A header of odd length puts every word at an odd place."""
    path = make_quantised(tmp_path, "int4")
    expected = quantised_expert(path).down_DF.dequantise()
    for file in path.glob("*.safetensors"):
        edit_header(file, lambda header: header.update(__metadata__={}))
        odd = int.from_bytes(file.read_bytes()[:8], "little") % 2
        edit_header(file, lambda header, odd=odd: header.update(__metadata__={"pad": "x" * odd}))
        assert int.from_bytes(file.read_bytes()[:8], "little") % 2 == 1
    assert torch.equal(quantised_expert(path).down_DF.dequantise(), expected)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(number=Number.FLOAT8),
        Scheme(number=Number.INT8, is_packed=True),
        Scheme(number=Number.INT8),
        Scheme(number=Number.INT4, group_size=128, is_packed=True),
    ],
    ids=lambda scheme: scheme.title,
)
def test_a_scheme_is_read_back_as_it_was_stated(scheme: Scheme) -> None:
    raw = json.dumps({"quantization_config": scheme_json(scheme, ["lm_head"])}).encode()
    assert parse_scheme(raw, CONFIG) == scheme
    nested = json.dumps({"text_config": {"quantization_config": scheme_json(scheme, [])}}).encode()
    assert parse_scheme(nested, CONFIG) == scheme
    assert parse_scheme(b"{}", CONFIG) is None


def test_a_config_as_long_as_mavericks_is_read() -> None:
    """Its list of ignored modules makes it run past 600 lines."""
    ignore = [f"vision_model.model.layers.{i}.{m}" for i in range(34) for m in ("q", "k", "v", "o", "fc1", "fc2")] * 4
    content = {"quantization_config": scheme_json(Scheme(number=Number.FLOAT8), ignore)}
    weights_of(content).update(observer="minmax", observer_kwargs={}, actorder=None, block_structure=None)
    raw = json.dumps(content, indent=2)
    assert raw.count("\n") > 600
    assert parse_scheme(raw.encode(), CONFIG) == Scheme(number=Number.FLOAT8)


WRONG: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("another method", lambda q: q.update(quant_method="gptq"), "quant_method is 'gptq'; 'compressed-tensors'"),
    ("no method", lambda q: q.pop("quant_method"), "quantization_config.quant_method is missing"),
    ("another format", lambda q: q.update(format="marlin-24"), "format is 'marlin-24', which is not supported"),
    ("not compressed", lambda q: q.update(quantization_status="frozen"), "quantization_status is 'frozen'"),
    ("cache", lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is .* must be left out"),
    ("no groups", lambda q: q.update(config_groups={}), "config_groups has 0 groups"),
    ("two groups", lambda q: q["config_groups"].update(b=q["config_groups"]["group_0"]), "config_groups has 2 groups"),
    ("ignore", lambda q: q.update(ignore=[1]), "ignore is .*; a list of module names"),
    ("bits", lambda q: wrong_weights(q, num_bits=4), "num_bits is 4 of type 'float'"),
    ("kind", lambda q: wrong_weights(q, type="complex"), "num_bits is 8 of type 'complex'"),
    ("symmetry", lambda q: wrong_weights(q, symmetric=False), "weights.symmetric is False; True is supported"),
    ("strategy", lambda q: wrong_weights(q, strategy="block"), "strategy is 'block'; channel is supported for float8"),
    ("dynamic", lambda q: wrong_weights(q, dynamic=True), "weights.dynamic is True, which is not supported"),
    ("order", lambda q: wrong_weights(q, actorder="group"), "actorder is 'group'"),
    ("rows", lambda q: q["config_groups"]["group_0"].pop("input_activations"), "input_activations is missing"),
    ("static rows", lambda q: wrong_rows(q, dynamic=False), "input_activations.dynamic is False; True"),
    ("rows together", lambda q: wrong_rows(q, strategy="tensor"), "input_activations.strategy is 'tensor'"),
    ("outputs", lambda q: q["config_groups"]["group_0"].update(output_activations={"a": 1}), "output_activations is"),
]


def wrong_weights(config: dict[str, Any], **changes: Any) -> None:
    config["config_groups"]["group_0"]["weights"].update(changes)


def wrong_rows(config: dict[str, Any], **changes: Any) -> None:
    config["config_groups"]["group_0"]["input_activations"].update(changes)


@pytest.mark.parametrize(("edit", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_is_not_computed_is_refused_by_key_and_value(
    edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    config = scheme_json(Scheme(number=Number.FLOAT8), [])
    edit(config)
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_scheme(json.dumps({"quantization_config": config}).encode(), CONFIG)
    assert caught.value.file == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": None}, "group_size is missing"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 3}, "group_size is 3; an even number"),
        ({"group_size": True}, "group_size is True"),
        ({"num_bits": 3}, "num_bits is 3"),
    ],
)
def test_a_group_size_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    config = scheme_json(Scheme(number=Number.INT4, group_size=128, is_packed=True), [])
    wrong_weights(config, **changes)
    with pytest.raises(CheckpointError, match=message):
        parse_scheme(json.dumps({"quantization_config": config}).encode(), CONFIG)


def test_int8_rows_are_refused() -> None:
    config = scheme_json(Scheme(number=Number.INT8), [])
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    with pytest.raises(CheckpointError, match=r"input_activations is .*, which is not supported"):
        parse_scheme(json.dumps({"quantization_config": config}).encode(), CONFIG)


def test_values_are_number_times_scale_in_the_wider_type() -> None:
    scales_FG = torch.tensor([[0.1], [0.3]], dtype=torch.bfloat16)
    stored = torch.tensor([[100, -3], [7, 0]], dtype=torch.int8)
    linear = QuantisedLinear(scheme=Scheme(number=Number.INT8), width=2, stored=stored, scales_FG=scales_FG)
    expected = stored.double() * scales_FG.double()
    assert torch.equal(linear.dequantise(torch.float64), expected)
    assert torch.equal(linear.dequantise(torch.bfloat16), expected.float().bfloat16())
