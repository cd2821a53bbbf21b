"""Reads the sampling defaults that a checkpoint's author published in generation_config.json."""

from dataclasses import dataclass
from pathlib import Path

from llama4_dist.checkpoint.config_fields import Fields
from llama4_dist.checkpoint.directory import has_file, read_small_file
from llama4_dist.checkpoint.strict_json import parse_object

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the file states; None or () where it states nothing, so that a caller can tell."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    eos_token_ids: tuple[int, ...] = ()


def read_generation_defaults(directory: Path, vocab_size: int) -> GenerationDefaults:
    """Read `directory`/generation_config.json if there is one; raise CheckpointError naming a wrong key."""
    if not has_file(directory, GENERATION_CONFIG):
        return GenerationDefaults()
    fields = Fields(parse_object(read_small_file(directory, GENERATION_CONFIG), GENERATION_CONFIG), GENERATION_CONFIG)
    return GenerationDefaults(
        do_sample=fields.boolean("do_sample") if fields.has("do_sample") else None,
        temperature=fields.number("temperature", above=-1e-9, maximum=100.0, default=None),
        top_p=fields.number("top_p", above=0.0, maximum=1.0, default=None),
        eos_token_ids=fields.integers("eos_token_id", minimum=0, maximum=vocab_size - 1, default=()),
    )
