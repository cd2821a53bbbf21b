"""Makes synthetic checkpoints: holes, random weights, or some of both; reads no other checkpoint.

Weights have a deviation of about 1/sqrt(fan in), twice that where attention and routing shall have clear winners, and
norms lie around 1: activations keep their size through any depth, and every feature of the model shows in its logits.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_dist.checkpoint.config_file import CONFIG
from llama4_dist.checkpoint.directory import allocated_bytes
from llama4_dist.checkpoint.generation_file import GENERATION_CONFIG
from llama4_dist.checkpoint.names import ExpertLayout, Shape, expert_linear_name
from llama4_dist.checkpoint.synthetic import Origin, origin_section
from llama4_dist.checkpoint.text_tensors import STORED_DTYPES
from llama4_dist.checkpoint.writing.directory import new_directory
from llama4_dist.checkpoint.writing.fill import chooser
from llama4_dist.checkpoint.writing.geometry import checked, overridden, parse_scale, preset_content, scaled
from llama4_dist.checkpoint.writing.layouts import ExpertMatrix, lay_out
from llama4_dist.checkpoint.writing.random_matrix import RandomMatrix
from llama4_dist.checkpoint.writing.shard_plan import plan_shards
from llama4_dist.checkpoint.writing.write import Counter, Progress, check_disk, write_checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError

STRONG = ("q_proj.weight", "router.weight", "lm_head.weight", "embed_tokens.weight")
EMBEDDING_FAN_IN = 4  # an embedding adds nothing up; rows of about unit size suit the first norm
NORM_STD = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthRequest:
    """What to make; `fill` are patterns of `writing.fill`, and without `is_sparse` everything is filled."""

    preset: str
    scale: str = "1"
    overrides: tuple[str, ...] = ()
    seed: int = 0
    dtype: str | None = None  # None = the preset's
    layout: ExpertLayout = ExpertLayout.FUSED
    is_sparse: bool = False
    fill: tuple[str, ...] = ()
    shard_bytes: int = 10 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthReport:
    """What came out."""

    config: ModelConfig
    origin: Origin
    num_parameters: int
    num_files: int
    apparent_bytes: int
    filled_bytes: int
    allocated_bytes: int


def synthesise(request: SynthRequest, out: Path, progress: Progress | None = None) -> SynthReport:
    """Write the checkpoint; ConfigError for what cannot be made, PreconditionError where the disk will not have it."""
    if request.fill and not request.is_sparse:
        raise ConfigError("--fill chooses what is not a hole: give --sparse too, or leave it out to fill everything")
    content = _content(request)
    config = checked(content)
    origin = _origin(request)
    is_filled = chooser(config, request.fill) if request.is_sparse else lambda name: True
    tensors = lay_out(config, request.layout, _Random(config, request.seed, is_filled))
    shards = plan_shards(tensors, request.shard_bytes)
    small_files = {
        CONFIG: _text(content | origin_section(origin)),
        GENERATION_CONFIG: _text(_generation(content)),
    }
    filled = sum(tensor.bytes_moved for tensor in tensors)
    with new_directory(out) as stage:
        check_disk(stage, shards, filled)
        write_checkpoint(stage, shards, small_files, Counter(filled, progress))
    return SynthReport(
        config=config,
        origin=origin,
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        num_files=len(shards),
        apparent_bytes=sum(shard.num_bytes for shard in shards),
        filled_bytes=filled,
        allocated_bytes=sum(allocated_bytes(file) for file in out.iterdir()),
    )


class _Random:
    """Provides random matrices for the names that are filled."""

    def __init__(self, config: ModelConfig, seed: int, is_filled: Callable[[str], bool]) -> None:
        self._shapes = {
            "gate": (config.hidden_size, config.expert_width),
            "down": (config.expert_width, config.hidden_size),
        }
        self._shapes["up"] = self._shapes["gate"]
        self._seed, self._is_filled = seed, is_filled
        self._dtype = STORED_DTYPES[config.dtype]

    def tensor(self, name: str, shape: Shape) -> RandomMatrix | None:
        if len(shape) == 1:
            return self._matrix(name, (1, *shape), mean=1.0, std=NORM_STD)
        fan_in = EMBEDDING_FAN_IN if name.endswith("embed_tokens.weight") else shape[1]
        return self._matrix(name, (shape[0], shape[1]), std=(2.0 if name.endswith(STRONG) else 1.0) / fan_in**0.5)

    def expert(self, layer: int, expert: int, projection: str) -> ExpertMatrix | None:
        shape = self._shapes[projection]
        matrix = self._matrix(expert_linear_name(layer, expert, projection), shape, std=shape[0] ** -0.5)
        return ExpertMatrix(matrix, is_transposed=False) if matrix else None

    def _matrix(self, name: str, shape: tuple[int, int], *, std: float, mean: float = 0.0) -> RandomMatrix | None:
        if not self._is_filled(name):
            return None
        rows, columns = shape
        return RandomMatrix(
            name=name, seed=self._seed, num_rows=rows, row_length=columns, mean=mean, std=std, dtype=self._dtype
        )


def _content(request: SynthRequest) -> dict[str, Any]:
    content = scaled(preset_content(request.preset), parse_scale(request.scale))
    content = overridden(content, request.overrides)
    return content | ({"torch_dtype": request.dtype} if request.dtype else {})


def _origin(request: SynthRequest) -> Origin:
    weights = "random" if not request.is_sparse else "partly random" if request.fill else "holes"
    return Origin(
        preset=request.preset,
        scale=request.scale,
        weights=weights,
        seed=request.seed,
        overrides=request.overrides,
        fill=request.fill,
    )


def _generation(content: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"do_sample": True, "temperature": 0.6, "top_p": 0.9} | tokens


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
