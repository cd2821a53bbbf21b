"""Makes the plan that `verify` and `shard` work with: read from a file, or placed as a cluster would."""

from dataclasses import dataclass
from pathlib import Path

from cluster.planning.placement import ExpertGeometry, HostSlot, place
from llama4_dist.checkpoint.cluster_shape import ClusterShape, Unit, check_shape, read_shape
from llama4_dist.checkpoint.describe import expert_bytes
from llama4_dist.checkpoint.directory import read_small_file
from llama4_dist.checkpoint.expert_slices import slice_bounds
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.strict_json import parse_object
from llama4_dist.config import ModelConfig
from llama4_dist.deploy.plan_file import parse_plan
from llama4_dist.errors import CheckpointError, ConfigError
from llama4_dist.partition import Partition

PLANNED_SIZES = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "expert_width", "num_experts", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeFlags:
    """A cluster's shape as flags state it: a plan file, or numbers."""

    hosts: int | None
    slices: int
    replicas: int
    stages: int
    ranks: int
    plan: Path | None

    @property
    def is_given(self) -> bool:
        return self.plan is not None or self.hosts is not None

    def shape(self, checkpoint: Checkpoint) -> ClusterShape:
        """Return the plan; ConfigError where the flags contradict each other or the model, or cut a quantised group."""
        config = checkpoint.config
        if self.plan is not None:
            if self.hosts is not None:
                raise ConfigError("--plan and --hosts contradict each other: give one")
            shape = _planned(config, self.plan)
        else:
            shape = _placed(config, self)
        check_shape(config, shape)
        try:
            for one in checkpoint.expert_formats:
                one.check_slices(config.expert_width, shape.num_slices)
            checkpoint.shares_of(shape.partition)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return shape


def _planned(config: ModelConfig, file: Path) -> ClusterShape:
    """Read who holds what, or a layout that `llama4-dist plan` found, which is placed as its cluster would be."""
    try:
        document = parse_object(read_small_file(file.parent, file.name), file.name)
    except CheckpointError as error:
        raise ConfigError(error.message) from None
    if "schema" not in document:
        return read_shape(file)
    plan = parse_plan(document)
    for name in PLANNED_SIZES:
        if (planned := document["model"].get(name)) != (stored := getattr(config, name)):
            raise ConfigError(f"{file.name} plans for {name}={planned}, the checkpoint has {stored}: plan for this one")
    flags = ShapeFlags(
        hosts=plan.hosts, slices=plan.slices, replicas=plan.replicas, stages=plan.stages, ranks=plan.ranks, plan=None
    )
    return _placed(config, flags)


def _placed(config: ModelConfig, flags: ShapeFlags) -> ClusterShape:
    """Place slices as the cluster does: a slice is a unit, numbered expert · S + slice."""
    try:
        partition = Partition(num_stages=flags.stages, num_ranks=flags.ranks)
        units = _units(config, flags) if config.moe_layer_ids else {}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return ClusterShape(num_slices=flags.slices, num_replicas=flags.replicas, partition=partition, units=units)


def _units(config: ModelConfig, flags: ShapeFlags) -> dict[str, tuple[Unit, ...]]:
    num_slices = flags.slices
    widest = max(map(len, slice_bounds(config.expert_width, num_slices)))
    geometry = ExpertGeometry(
        moe_layers=config.moe_layer_ids,
        num_experts=config.num_experts,
        expert_width=config.expert_width,
        expert_bytes=expert_bytes(config),
        num_slices=num_slices,
        slice_bytes=expert_bytes(config) * widest // config.expert_width,
    )
    hosts = [f"expert-{number}" for number in range(flags.hosts or 0)]
    placement = place(geometry, [HostSlot(host=host, node=host) for host in hosts], num_replicas=flags.replicas)
    return {
        host: tuple((layer, unit // num_slices, unit % num_slices) for layer, unit in placement.held_by(host))
        for host in hosts
    }
