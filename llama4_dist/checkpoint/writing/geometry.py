"""Derives the config.json of a synthetic checkpoint from a member of the family: narrower, or with keys replaced."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama4_dist.checkpoint.config_file import parse_config
from llama4_dist.checkpoint.presets import PRESETS
from llama4_dist.config import ModelConfig
from llama4_dist.errors import CheckpointError, ConfigError

WIDTHS = ("hidden_size", "intermediate_size", "intermediate_size_mlp")
MIN_HEAD_DIM = 16
VOCAB_MULTIPLE = 64  # ranks share a vocabulary out
NUM_SPECIAL_TOKENS, NUM_BYTES = 2048, 256  # the published vocabulary ends with as many special tokens
# Keys that config.json may have and the presets do not state.
FURTHER_KEYS = ("moe_layers", "layer_types", "no_rope_layer_interval", "rope_parameters")


def preset_content(name: str) -> dict[str, Any]:
    """Return the config.json of a member of the family; ConfigError for a name that is none."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known: choose one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])


def parse_scale(given: str) -> int:
    """Read `1/64`; return 64."""
    match = re.fullmatch(r"1/([1-9][0-9]{0,5})|1", given.strip())
    if match is None:
        raise ConfigError(f"scale {given!r} is no fraction of the form 1/N: give e.g. 1/64")
    return int(match[1] or 1)


def scaled(content: Mapping[str, Any], divisor: int) -> dict[str, Any]:
    """Divide every width by `divisor`: same depth, same experts, same ratio of query to KV heads where it can be kept.

    Head width shrinks first, down to 16, then the number of heads. The vocabulary is rounded up to a multiple of 64
    and keeps room for the special tokens, whose ids keep their distance from its end.
    """
    if divisor == 1:
        return dict(content)
    narrow = {key: _divided(key, content[key], divisor) for key in WIDTHS}
    return dict(content) | narrow | _heads(content, divisor) | _vocabulary(content, divisor)


def overridden(content: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Replace keys by `key=value`; a value is JSON, or else a string. ConfigError for a key that means nothing."""
    known = {*content, *FURTHER_KEYS}
    changed = dict(content)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            close = difflib.get_close_matches(key, content, n=1) or difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f": choose one of {', '.join(sorted(known))}"
            raise ConfigError(f"--set {setting!r} is no KEY=VALUE of config.json{hint}")
        try:
            changed[key] = json.loads(value)
        except ValueError:
            changed[key] = value
    return changed


def checked(content: Mapping[str, Any]) -> ModelConfig:
    """Parse the result as a reader will; ConfigError where it is no model."""
    try:
        return parse_config(json.dumps(content).encode())
    except CheckpointError as error:
        raise ConfigError(f"this is no model that can be read: {error.message}") from None


def _divided(key: str, value: int, divisor: int) -> int:
    if value % divisor:
        raise ConfigError(f"scale 1/{divisor} does not divide {key} {value}: choose a divisor of it, e.g. 1/16 or 1/64")
    return value // divisor


def _heads(content: Mapping[str, Any], divisor: int) -> dict[str, int]:
    head_dim, heads, kv_heads = (content[key] for key in ("head_dim", "num_attention_heads", "num_key_value_heads"))
    shrunk = next(d for d in range(min(divisor, head_dim // MIN_HEAD_DIM), 0, -1) if divisor % d == head_dim % d == 0)
    fewer = divisor // shrunk
    num_heads = _divided("num_attention_heads", heads, fewer) if heads >= fewer else 0
    if not num_heads:
        raise ConfigError(f"scale 1/{divisor} leaves no attention head of the {heads} there are: choose a wider one")
    num_kv_heads = kv_heads // fewer if kv_heads % fewer == 0 else 1
    return {"head_dim": head_dim // shrunk, "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}


def _vocabulary(content: Mapping[str, Any], divisor: int) -> dict[str, Any]:
    full = content["vocab_size"]
    size = max(-(-full // divisor), NUM_SPECIAL_TOKENS + NUM_BYTES)
    size += -size % VOCAB_MULTIPLE
    moved = size - full
    eos = content["eos_token_id"]
    return {
        "vocab_size": size,
        "bos_token_id": content["bos_token_id"] + moved,
        "eos_token_id": [token + moved for token in eos],
        "pad_token_id": content["pad_token_id"] + moved,
    }
