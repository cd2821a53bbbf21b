"""Derives which layers are rotary, chunked and routed from the lists and intervals of config.json.

Source: transformers `models/llama4/configuration_llama4.py`, `Llama4TextConfig.__post_init__`.
"""

from llama4_dist.checkpoint.config_fields import Fields
from llama4_dist.checkpoint.fault import shown

_CHUNKED = {"chunked_attention": True, "full_attention": False}


def rope_layers(text: Fields, num_layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` holds 1 where a layer does rotate, despite its name; empty or missing: every 4th does not."""
    stated = text.integers("no_rope_layers", minimum=0, maximum=1, default=())
    if not stated:
        interval = text.integer("no_rope_layer_interval", minimum=1, maximum=2**31, default=4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if len(stated) != num_layers:
        raise text.fault("no_rope_layers", f"has {len(stated)} entries for {num_layers} layers")
    return tuple(bool(rope) for rope in stated)


def chunked_layers(text: Fields, rope: tuple[bool, ...]) -> tuple[bool, ...]:
    """`layer_types` where a file has it, else exactly the rotary layers are chunked."""
    stated = text.find("layer_types", None)
    if stated is None:
        return rope
    if not isinstance(stated, list) or len(stated) != len(rope):
        raise text.fault("layer_types", f"is {shown(stated)}; a list of {len(rope)} names is expected")
    for kind in stated:
        if not isinstance(kind, str) or kind not in _CHUNKED:
            raise text.fault("layer_types", f"holds {shown(kind)}; {' and '.join(_CHUNKED)} are supported")
    return tuple(_CHUNKED[kind] for kind in stated)


def moe_layers(text: Fields, num_layers: int) -> tuple[bool, ...]:
    """`moe_layers` where a file has it (empty: none), else the last of every `interleave_moe_layer_step` layers."""
    stated = text.integers("moe_layers", minimum=0, maximum=num_layers - 1, default=None)
    if stated is None:
        step = text.integer("interleave_moe_layer_step", minimum=1, maximum=2**31)
        return tuple((layer + 1) % step == 0 for layer in range(num_layers))
    if len(set(stated)) != len(stated):
        raise text.fault("moe_layers", f"is {shown(stated)}; a layer is named twice")
    return tuple(layer in stated for layer in range(num_layers))
