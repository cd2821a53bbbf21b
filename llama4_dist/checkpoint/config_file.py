"""Turns config.json into a ModelConfig; reads transformers' v4 and v5 spellings, flat or nested under text_config.

Only keys that the published files leave out have defaults here, and those are the values the files' authors rely on
(transformers `models/llama4/configuration_llama4.py`). Everything else must be in the file: the class defaults of
transformers (bos 1, eos 2, a 768-wide vision encoder) are those of no published model.
"""

import logging
from pathlib import Path

from llama4_dist.checkpoint.config_fields import Fields
from llama4_dist.checkpoint.config_layers import chunked_layers, moe_layers, rope_layers
from llama4_dist.checkpoint.directory import read_small_file
from llama4_dist.checkpoint.fault import shown
from llama4_dist.checkpoint.strict_json import parse_object
from llama4_dist.config import ModelConfig, RopeScaling

log = logging.getLogger(__name__)

CONFIG = "config.json"
ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
DTYPES = ("float32", "bfloat16", "float16")
# Bounds that no real model comes near; they keep a hostile file from asking for absurd amounts of anything.
MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_EXPERTS = 2**20, 1024, 4096, 65536
MAX_VOCAB, MAX_POSITIONS = 2**22, 2**31


def read_config(directory: Path) -> ModelConfig:
    """Read and check `directory`/config.json; raise CheckpointError naming the key that is wrong."""
    return parse_config(read_small_file(directory, CONFIG))


def parse_config(raw: bytes) -> ModelConfig:
    """Return the geometry that the config.json `raw` states."""
    content = parse_object(raw, CONFIG)
    top = Fields(content, CONFIG)
    text = top.section("text_config") if top.has("text_config") else top
    architecture = _architecture(top)
    for fields in (top, text):
        _refuse_unsupported(fields)
    num_layers = text.integer("num_hidden_layers", minimum=1, maximum=MAX_LAYERS)
    num_heads = text.integer("num_attention_heads", minimum=1, maximum=MAX_HEADS)
    hidden_size = text.integer("hidden_size", minimum=1, maximum=MAX_WIDTH)
    vocab_size = text.integer("vocab_size", minimum=1, maximum=MAX_VOCAB)
    rope = rope_layers(text, num_layers)
    chunked = chunked_layers(text, rope)
    moe = moe_layers(text, num_layers)
    num_experts, experts_per_token = _experts(text, any(moe))
    theta, scaling = _rope(text)
    _warn_of_old_scaling(num_experts, scaling)
    return ModelConfig(
        architecture=architecture,
        dtype=_dtype(text, top),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_kv_heads(text, num_heads),
        head_dim=_head_dim(text, hidden_size, num_heads),
        expert_width=text.integer("intermediate_size", minimum=1, maximum=MAX_WIDTH),
        dense_width=text.integer("intermediate_size_mlp", minimum=1, maximum=MAX_WIDTH),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        vocab_size=vocab_size,
        rms_norm_eps=text.number("rms_norm_eps", above=0.0, maximum=1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_layers=rope,
        chunked_layers=chunked,
        moe_layers=moe,
        chunk_size=_chunk_size(text, any(chunked)),
        use_qk_norm=text.boolean("use_qk_norm"),
        temperature_tuning=_temperature_tuning(text),
        floor_scale=text.number("floor_scale", above=0.0, maximum=1e12, default=8192.0),
        attn_scale=text.number("attn_scale", above=-1e3, maximum=1e3, default=0.1),
        tie_word_embeddings=_nearest(text, top, "tie_word_embeddings").boolean("tie_word_embeddings", False),
        max_position_embeddings=text.integer("max_position_embeddings", minimum=1, maximum=MAX_POSITIONS),
        bos_token_id=_token(text, top, "bos_token_id", vocab_size),
        eos_token_ids=_nearest(text, top, "eos_token_id").integers("eos_token_id", minimum=0, maximum=vocab_size - 1),
        pad_token_id=_token(text, top, "pad_token_id", vocab_size),
        has_vision=top.has("vision_config"),
    )


def _architecture(top: Fields) -> str:
    named = top.find("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        raise top.fault("architectures", f"is {shown(named)}; one of {', '.join(ARCHITECTURES)} is supported")
    return str(named[0])


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse what would run a stranger's code, and what would silently compute another function."""
    if fields.has("auto_map"):
        raise fields.fault("auto_map", "asks for code from the checkpoint directory, which is never run: remove it")
    if fields.string("hidden_act", "silu") != "silu":
        raise fields.fault("hidden_act", f"is {shown(fields.find('hidden_act'))}; only silu is supported")
    if fields.boolean("attention_bias", False):
        raise fields.fault("attention_bias", "is true; Llama 4's decoder has no biases")


def _kv_heads(text: Fields, num_heads: int) -> int:
    num_kv_heads = text.integer("num_key_value_heads", minimum=1, maximum=num_heads)
    if num_heads % num_kv_heads:
        raise text.fault("num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads")
    return num_kv_heads


def _head_dim(text: Fields, hidden_size: int, num_heads: int) -> int:
    """`head_dim` is its own field; D / H only where a file has none."""
    if not text.has("head_dim") and hidden_size % num_heads:
        raise text.fault("head_dim", f"is missing and {num_heads} heads do not divide a width of {hidden_size}")
    head_dim = text.integer("head_dim", minimum=2, maximum=4096, default=hidden_size // num_heads)
    if head_dim % 2 or not head_dim:
        raise text.fault("head_dim", f"is {head_dim}; rotary embedding turns pairs, so it must be even")
    return head_dim


def _experts(text: Fields, has_moe: bool) -> tuple[int, int]:
    """Return (E, K); a dense model may state zero experts, whichever numbers it states are not used."""
    if not has_moe:
        return 0, 0
    num_experts = text.integer("num_local_experts", minimum=1, maximum=MAX_EXPERTS)
    experts_per_token = text.integer("num_experts_per_tok", minimum=1, maximum=MAX_EXPERTS)
    if experts_per_token > num_experts:
        raise text.fault("num_experts_per_tok", f"is {experts_per_token}, more than the {num_experts} experts")
    return num_experts, experts_per_token


def _rope(text: Fields) -> tuple[float, RopeScaling | None]:
    """Read v5's one dict `rope_parameters`, or v4's pair `rope_theta` and `rope_scaling`."""
    if text.has("rope_parameters"):
        rope = text.section("rope_parameters")
        return rope.number("rope_theta", above=0.0, maximum=1e12), _rope_scaling(rope)
    theta = text.number("rope_theta", above=0.0, maximum=1e12)
    return theta, _rope_scaling(text.section("rope_scaling")) if text.has("rope_scaling") else None


def _rope_scaling(rope: Fields) -> RopeScaling | None:
    kind = "rope_type" if rope.has("rope_type") or not rope.has("type") else "type"  # `type` is the oldest spelling
    rope_type = rope.string(kind)
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise rope.fault(kind, f"is {shown(rope_type)}; llama3 and default are supported")
    scaling = RopeScaling(
        factor=rope.number("factor", above=0.0, maximum=1e6),
        low_freq_factor=rope.number("low_freq_factor", above=0.0, maximum=1e6),
        high_freq_factor=rope.number("high_freq_factor", above=0.0, maximum=1e6),
        original_max_position=rope.integer("original_max_position_embeddings", minimum=1, maximum=MAX_POSITIONS),
    )
    if scaling.high_freq_factor < scaling.low_freq_factor:
        raise rope.fault("high_freq_factor", f"is {scaling.high_freq_factor:g}, below low_freq_factor")
    return scaling


def _warn_of_old_scaling(num_experts: int, scaling: RopeScaling | None) -> None:
    if num_experts == 16 and scaling and (scaling.factor, scaling.high_freq_factor) == (8.0, 4.0):
        log.warning("scout_rope_scaling_outdated factor=8 high_freq_factor=4 current=16/1 file=%s", CONFIG)


def _chunk_size(text: Fields, has_chunked: bool) -> int | None:
    if not has_chunked and not text.has("attention_chunk_size"):
        return None
    return text.integer("attention_chunk_size", minimum=1, maximum=MAX_POSITIONS)


def _temperature_tuning(text: Fields) -> bool:
    """Published files leave it out and mean true; early ones state the integer 4."""
    value = text.find("attn_temperature_tuning", True)
    if type(value) not in (bool, int):
        raise text.fault("attn_temperature_tuning", f"is {shown(value)}; true or false is expected")
    return bool(value)


def _nearest(text: Fields, top: Fields, key: str) -> Fields:
    """Where to read a key that files keep in either place: the text section if it has it."""
    return text if text.has(key) or not top.has(key) else top


def _dtype(text: Fields, top: Fields) -> str:
    for key in ("dtype", "torch_dtype"):
        fields = _nearest(text, top, key)
        if fields.has(key):
            dtype = fields.string(key)
            if dtype not in DTYPES:
                raise fields.fault(key, f"is {shown(dtype)}; {', '.join(DTYPES)} are supported")
            return dtype
    raise text.fault("torch_dtype", f"is missing; state which of {', '.join(DTYPES)} the weights are")


def _token(text: Fields, top: Fields, key: str, vocab_size: int) -> int | None:
    return _nearest(text, top, key).integer(key, minimum=0, maximum=vocab_size - 1, default=None)
