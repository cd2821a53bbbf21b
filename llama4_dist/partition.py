"""Cuts a model into pipeline stages and tensor-parallel ranks: who holds which layers, heads, columns and vocabulary.

Pure arithmetic on a geometry: no torch, no files, no processes.
Source of the cut within a layer: Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), section 3.
"""

from dataclasses import dataclass, replace

from llama4_dist.config import ModelConfig

# Columns of a feed-forward network and rows of the vocabulary are cut at multiples of the largest of these that leaves
# every rank something: native passes multiply strips of 32 or 64 columns, CUDA's tiles are 128 wide.
ALIGNMENTS = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """The shape of an attention group: `num_stages` parts of the layers, each on `num_ranks` members."""

    num_stages: int = 1
    num_ranks: int = 1

    def __post_init__(self) -> None:
        for name in ("num_stages", "num_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def num_members(self) -> int:
        return self.num_stages * self.num_ranks

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """The (stage, rank) of each member, stage by stage."""
        return tuple((stage, rank) for stage in range(self.num_stages) for rank in range(self.num_ranks))


WHOLE = Partition()


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one member holds. Ranges are of the whole model's numbers; norms and the router are whole on every rank."""

    partition: Partition
    stage: int
    rank: int
    layers: range
    heads: range
    kv_heads: range
    shared_columns: range  # of a shared expert's width
    dense_columns: range  # of a dense layer's width
    vocabulary: range  # of the embedding where the stage is the first, of the head where it is the last
    head_dim: int

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.partition.num_stages - 1

    @property
    def num_ranks(self) -> int:
        return self.partition.num_ranks

    def local(self, config: ModelConfig) -> ModelConfig:
        """Return the geometry of the member's part of each layer; layers keep their numbers."""
        return replace(
            config,
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            vocab_size=len(self.vocabulary),
        )

    def cut(self, name: str) -> tuple[range | None, range | None]:
        """Return which outputs and which inputs of a tensor the member reads, by canonical name; None = all.

        Queries, keys, values, gate and up are cut by output, what follows them by input, so that a rank's part of a
        block is a summand of the block's output.
        """
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part in ("embed_tokens", "lm_head"):
            return self.vocabulary, None
        if module.endswith("self_attn"):
            return self._cut_attention(part)
        if part in ("gate_proj", "up_proj", "down_proj"):
            columns = self.shared_columns if module.endswith("shared_expert") else self.dense_columns
            return (None, columns) if part == "down_proj" else (columns, None)
        return None, None

    def _cut_attention(self, part: str) -> tuple[range | None, range | None]:
        heads = self.heads if part in ("q_proj", "o_proj") else self.kv_heads
        width = range(heads.start * self.head_dim, heads.stop * self.head_dim)
        return (None, width) if part == "o_proj" else (width, None)


def share_of(config: ModelConfig, partition: Partition, *, stage: int, rank: int) -> Share:
    """Return the part of a model that one member holds; ValueError where the model cannot be cut so."""
    check_partition(config, partition)
    if not (0 <= stage < partition.num_stages and 0 <= rank < partition.num_ranks):
        raise ValueError(f"{stage=} and {rank=} name no member of {partition}")
    num_ranks, num_heads, num_kv_heads = partition.num_ranks, config.num_heads, config.num_kv_heads
    kv_heads = part_of(num_kv_heads, rank, num_ranks)
    if num_ranks > num_kv_heads:  # ranks whose query heads share a key/value head hold a copy of it each
        kv_heads = range(rank * num_kv_heads // num_ranks, rank * num_kv_heads // num_ranks + 1)
    return Share(
        partition=partition,
        stage=stage,
        rank=rank,
        layers=layers_of_stages(config.num_layers, partition.num_stages)[stage],
        heads=part_of(num_heads, rank, num_ranks),
        kv_heads=kv_heads,
        shared_columns=_aligned_part(config.expert_width, rank, num_ranks),
        dense_columns=_aligned_part(config.dense_width, rank, num_ranks),
        vocabulary=_aligned_part(config.vocab_size, rank, num_ranks),
        head_dim=config.head_dim,
    )


def shares_of(config: ModelConfig, partition: Partition) -> tuple[Share, ...]:
    """Return the shares of all members, in the order of `partition.places`."""
    return tuple(share_of(config, partition, stage=stage, rank=rank) for stage, rank in partition.places)


def whole_share(config: ModelConfig) -> Share:
    """Return the share of a member that is alone."""
    return share_of(config, WHOLE, stage=0, rank=0)


def layers_of_stages(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Return each stage's layers; their numbers differ by one at most.

    A dense layer counts as a mixture-of-experts one: it reads more weights, but waits for no expert host.
    """
    return tuple(part_of(num_layers, stage, num_stages) for stage in range(num_stages))


def check_partition(config: ModelConfig, partition: Partition) -> None:
    """Raise ValueError, with the remedy, where a model cannot be cut into so many stages and ranks."""
    num_stages, num_ranks = partition.num_stages, partition.num_ranks
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    if num_stages > config.num_layers:
        raise ValueError(f"{num_stages=} exceeds num_layers={config.num_layers}: a stage needs a layer; take fewer")
    if num_heads % num_ranks:
        raise ValueError(f"{num_ranks=} does not divide {num_heads=}: take a divisor")
    if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
        raise ValueError(
            f"{num_ranks=} neither divides {num_kv_heads=} nor is a multiple of it: a rank would hold parts of a "
            f"key/value head; take {num_kv_heads} or one of its divisors"
        )
    for name in ("expert_width", "dense_width", "vocab_size"):
        if getattr(config, name) < num_ranks:
            raise ValueError(f"{name}={getattr(config, name)} is less than {num_ranks=}: take fewer ranks")


def part_of(count: int, index: int, num_parts: int) -> range:
    """Return one of consecutive parts whose sizes differ by one at most."""
    return range(index * count // num_parts, (index + 1) * count // num_parts)


def _aligned_part(width: int, index: int, num_parts: int) -> range:
    """Return a part whose edges are multiples of an alignment; only the last may end elsewhere."""
    alignment = next(size for size in ALIGNMENTS if -(-width // size) >= num_parts)
    units = part_of(-(-width // alignment), index, num_parts)
    return range(units.start * alignment, min(width, units.stop * alignment))
