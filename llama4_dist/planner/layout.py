"""A layout of the cluster: how many GPUs do attention, how they are cut, and over what experts are spread.

It says why a layout is illegal for a geometry; whether it fits a memory is `planner.memory`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llama4_dist.checkpoint.expert_slices import slice_bounds
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError
from llama4_dist.partition import Partition, check_partition
from llama4_dist.planner import formats

MOST = {"stages": 1024, "ranks": 4096, "groups": 1 << 16, "hosts": 1 << 16, "sequences": 1 << 20}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`groups` attention groups of `stages` x `ranks` GPUs; `hosts` expert hosts.

    An expert is cut into `slices` that lie on different hosts, and has `replicas` copies; one of them serves, the
    others stand by. `gpus_per_host` > 1 splits the arithmetic inside a host. `sequences` is the batch of one group;
    a step goes through the layers in `microbatches` parts (each stage's part again, where there are stages).
    """

    stages: int = 1  # P
    ranks: int = 1  # T
    groups: int = 1  # n_A
    hosts: int = 1  # N
    gpus_per_host: int = 1  # g_e
    slices: int = 1  # S
    replicas: int = 1  # R
    sequences: int = 1  # B_a
    microbatches: int = 1  # m
    dtype: str = "fp8"
    wire: str = "fp8"
    kv_dtype: str = "fp8"
    link: str = "nic"

    def __post_init__(self) -> None:
        for name in (*MOST, "gpus_per_host", "slices", "replicas", "microbatches"):
            value, most = getattr(self, name), MOST.get(name, 4096)
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"layout {name}={value} must be a whole number from 1 to {most}")
        formats.weight_bytes(self.dtype)
        formats.dispatch_bytes(1, self.wire)
        formats.kv_bytes(self.kv_dtype)

    @property
    def gpus_per_group(self) -> int:
        return self.stages * self.ranks

    @property
    def attention_gpus(self) -> int:
        return self.groups * self.gpus_per_group

    @property
    def expert_gpus(self) -> int:
        return self.hosts * self.gpus_per_host

    @property
    def num_gpus(self) -> int:
        return self.attention_gpus + self.expert_gpus

    @property
    def total_sequences(self) -> int:
        """B_tot: what all groups decode together."""
        return self.groups * self.sequences

    def describe(self) -> str:
        """Say it in one line, as `--layout` reads it."""
        parts = [f"groups={self.groups}", f"T={self.ranks}", f"hosts={self.hosts}"]
        for name, value in (("P", self.stages), ("slices", self.slices), ("replicas", self.replicas)):
            parts += [f"{name}={value}"] if value > 1 else []
        if self.gpus_per_host > 1:
            parts.append(f"gpus_per_host={self.gpus_per_host}")
        return ",".join((*parts, f"batch={self.sequences}", f"m={self.microbatches}"))


def objections(layout: Layout, config: ModelConfig) -> Iterator[str]:
    """Yield why a layout is illegal for a geometry; nothing if it is legal."""
    if not config.moe_layer_ids:
        yield "the model has no routed experts: there is nothing to spread over expert hosts"
        return
    units = config.num_experts * layout.slices
    try:
        check_partition(config, Partition(num_stages=layout.stages, num_ranks=layout.ranks))
        slice_bounds(config.expert_width, layout.slices)
    except ValueError as error:  # what the engine says of it
        yield str(error)
    if layout.hosts < layout.slices * layout.replicas:
        copies = f"{layout.slices} slices x {layout.replicas} replicas of an expert"
        yield f"{copies} need {layout.slices * layout.replicas} hosts, not {layout.hosts}"
    if layout.hosts > units * layout.replicas:
        yield (
            f"{layout.hosts} hosts are more than the {units * layout.replicas} slices to place "
            f"({config.num_experts} experts x {layout.slices} slices x {layout.replicas} replicas): raise slices"
        )
    if layout.microbatches > layout.sequences:
        yield f"microbatches={layout.microbatches} exceed the batch of {layout.sequences} sequences"
