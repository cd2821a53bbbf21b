"""Layouts hold the same numbers: there and back gives the same files, and Meta's own model takes what is written."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Llama4ForCausalLM

from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.writing import moves
from llama4_dist.checkpoint.writing.convert import to_hugging_face, to_layout, to_meta, write_converted
from llama4_dist.errors import CheckpointError, ConfigError
from tests.checkpoint.writing.models import FUSED, PER_EXPERT, files_of, narrow
from tests.checkpoints import make_checkpoint

SHARD = 60_000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "PIECE_BYTES", 3000)


@pytest.mark.parametrize("layout", [FUSED, PER_EXPERT])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_to_meta_and_back_is_the_same_files(tmp_path: Path, layout: ExpertLayout, dtype: str) -> None:
    one, meta, back = tmp_path / "one", tmp_path / "meta", tmp_path / "back"
    narrow(one, layout=layout, dtype=dtype, shard_bytes=SHARD)
    write_converted(one, to_meta(one), meta, shard_bytes=SHARD)
    write_converted(meta, to_hugging_face(meta, layout), back, shard_bytes=SHARD)
    assert files_of(back) == files_of(one)


def test_experts_one_by_one_and_back_is_the_same_files(tmp_path: Path) -> None:
    one, single, back = tmp_path / "one", tmp_path / "single", tmp_path / "back"
    narrow(one, shard_bytes=SHARD)
    write_converted(one, to_layout(one, PER_EXPERT), single, shard_bytes=SHARD)
    write_converted(single, to_layout(single, FUSED), back, shard_bytes=SHARD)
    assert files_of(back) == files_of(one)
    narrow(tmp_path / "direct", layout=PER_EXPERT, shard_bytes=SHARD)
    assert files_of(single) == files_of(tmp_path / "direct")


def test_single_experts_are_the_fused_ones_turned(tmp_path: Path) -> None:
    """Against torch's own slicing and transposition of a checkpoint that this project did not write."""
    path = make_checkpoint(tmp_path / "one", "conditional", dtype=torch.bfloat16)
    write_converted(path, to_layout(path, PER_EXPERT), tmp_path / "single", shard_bytes=10**9)
    fused = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    single = load_file(tmp_path / "single" / "model.safetensors")
    prefix = "language_model.model.layers.2.feed_forward.experts."
    for expert in range(16):
        gate, up = fused[prefix + "gate_up_proj"][expert].chunk(2, dim=-1)
        assert torch.equal(single[f"{prefix}{expert}.gate_proj.weight"], gate.T)
        assert torch.equal(single[f"{prefix}{expert}.up_proj.weight"], up.T)
        assert torch.equal(single[f"{prefix}{expert}.down_proj.weight"], fused[prefix + "down_proj"][expert].T)
    vision = {name for name in fused if not name.startswith("language_model.")}
    assert vision
    assert all(torch.equal(single[name], fused[name]) for name in vision)


def test_vision_tensors_survive_the_way_through_meta(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "one", "conditional")
    write_converted(path, to_meta(path), tmp_path / "meta", shard_bytes=10**9)
    write_converted(tmp_path / "meta", to_hugging_face(tmp_path / "meta", FUSED), tmp_path / "back", shard_bytes=10**9)
    before = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_wrong_directions_are_refused_with_the_right_one(tmp_path: Path) -> None:
    narrow(tmp_path / "one")
    write_converted(tmp_path / "one", to_meta(tmp_path / "one"), tmp_path / "meta", shard_bytes=10**9)
    with pytest.raises(CheckpointError, match="checkpoint convert --to hf"):
        Checkpoint.open(tmp_path / "meta")
    with pytest.raises(ConfigError, match="not in Meta's layout"):
        to_hugging_face(tmp_path / "one", FUSED)
    with pytest.raises(ConfigError, match="fused already"):
        to_layout(tmp_path / "one", FUSED)
    with pytest.raises(ConfigError, match="tied head"):
        to_meta(make_checkpoint(tmp_path / "dense", "dense"))


def test_a_meta_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    narrow(tmp_path / "one")
    write_converted(tmp_path / "one", to_meta(tmp_path / "one"), tmp_path / "meta", shard_bytes=10**9)
    shard = tmp_path / "meta" / "model.safetensors"
    tensors = load_file(shard)
    del tensors["layers.3.attention.wo.weight"]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"layers\.3\.attention\.wo\.weight"):
        to_hugging_face(tmp_path / "meta", FUSED)


class Linear(nn.Linear):
    """Takes the further arguments of fairscale's parallel linears; one rank's share is all of it."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)


class Embedding(nn.Embedding):
    def __init__(self, rows: int, width: int, **_: Any) -> None:
        super().__init__(rows, width)


@pytest.fixture
def meta_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Meta's model definition, for one rank on a processor; fairscale, which it imports, only splits over ranks."""
    pytest.importorskip("llama_models.llama4.args")
    contents: dict[str, dict[str, Any]] = {
        "initialize": {"get_model_parallel_world_size": lambda: 1},
        "layers": {"ColumnParallelLinear": Linear, "RowParallelLinear": Linear, "VocabParallelEmbedding": Embedding},
        "mappings": {"reduce_from_model_parallel_region": lambda x: x},
    }
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in contents.items():
        module = ModuleType(f"fairscale.nn.model_parallel.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules["fairscale.nn.model_parallel"], name, module, raising=False)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    imported = {name: module for name, module in sys.modules.items() if name.startswith("llama_models.")}
    yield import_module("llama_models.llama4.model")
    for name in [name for name in sys.modules if name.startswith("llama_models.") and name not in imported]:
        del sys.modules[name]


def test_metas_own_model_takes_every_tensor_and_computes_what_transformers_does(
    tmp_path: Path, meta_model: ModuleType
) -> None:
    narrow(tmp_path / "one", "attn_temperature_tuning=false", "rope_scaling=null")
    write_converted(tmp_path / "one", to_meta(tmp_path / "one"), tmp_path / "meta", shard_bytes=10**9)
    args = import_module("llama_models.llama4.args")
    moe = args.MoEArgs(num_experts=4, interleave_moe_layer_step=2, auto_scale_F=False)
    model = meta_model.Transformer(
        args.ModelArgs(
            dim=48, n_layers=4, n_heads=3, n_kv_heads=1, vocab_size=320, multiple_of=1, ffn_dim_multiplier=1.0,
            ffn_exp=2.0, attention_chunk_size=16, nope_layer_interval=4, use_qk_norm=True, moe_args=moe,
            max_batch_size=1, max_seq_len=64,
        )
    )  # fmt: skip
    model.load_state_dict(load_file(tmp_path / "meta" / "model.safetensors"), strict=True)
    token_ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    datatypes = import_module("llama_models.llama4.datatypes")
    with torch.no_grad():
        meta = model(datatypes.TransformerInput(tokens=token_ids, tokens_position=0)).logits[0]
        reference = Llama4ForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
        theirs = reference(input_ids=token_ids).logits[0]
    torch.testing.assert_close(meta, theirs, atol=2e-4, rtol=0)
