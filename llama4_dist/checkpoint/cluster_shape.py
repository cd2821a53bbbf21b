"""Which worker of a cluster is to open which expert slices and which layers: a plan, as a file or made by a planner.

Pure but for reading the file; who makes a plan, and who the workers are, is not known here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama4_dist.checkpoint.config_fields import Fields
from llama4_dist.checkpoint.directory import read_small_file
from llama4_dist.checkpoint.expert_blocks import ExpertRun
from llama4_dist.checkpoint.expert_slices import slice_bounds
from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.checkpoint.strict_json import parse_object
from llama4_dist.config import ModelConfig
from llama4_dist.errors import CheckpointError, ConfigError
from llama4_dist.partition import Partition, check_partition

MAX_PLAN_SLICES = 4096
Unit = tuple[int, int, int]  # layer, expert, slice


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShape:
    """`units` of each expert host; every slice is meant to be on `num_replicas` of them."""

    num_slices: int
    num_replicas: int
    partition: Partition
    units: Mapping[str, tuple[Unit, ...]]

    def runs_of(self, config: ModelConfig, host: str) -> tuple[ExpertRun, ...]:
        """Return the columns that a host holds of each expert; slices that follow each other are one run."""
        bounds = slice_bounds(config.expert_width, self.num_slices)
        runs: list[ExpertRun] = []
        for layer, expert, number in sorted(set(self.units[host])):
            columns = bounds[number]
            if runs and runs[-1][:2] == (layer, expert) and runs[-1].stop == columns.start:
                runs[-1] = runs[-1]._replace(stop=columns.stop)
            else:
                runs.append(ExpertRun(layer, expert, columns.start, columns.stop))
        return tuple(runs)


def check_shape(config: ModelConfig, shape: ClusterShape) -> None:
    """Raise ConfigError where a model cannot be cut so, or a unit names what the geometry does not have."""
    try:
        if config.moe_layer_ids:
            slice_bounds(config.expert_width, shape.num_slices)
        check_partition(config, shape.partition)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    layers = set(config.moe_layer_ids)
    for host, units in shape.units.items():
        for layer, expert, number in units:
            if layer not in layers or not (0 <= expert < config.num_experts and 0 <= number < shape.num_slices):
                raise ConfigError(
                    f"the plan gives {host} slice {number} of expert {expert} in layer {layer}, which this model cut "
                    f"into {shape.num_slices} slices does not have"
                )


def shape_json(shape: ClusterShape) -> str:
    """Return the plan file's text."""
    content = {
        "format": 1,
        "num_slices": shape.num_slices,
        "num_replicas": shape.num_replicas,
        "num_stages": shape.partition.num_stages,
        "num_ranks": shape.partition.num_ranks,
        "hosts": {host: [list(unit) for unit in units] for host, units in shape.units.items()},
    }
    return json.dumps(content) + "\n"


def read_shape(path: Path) -> ClusterShape:
    """Read a plan file; ConfigError names what is wrong in it."""
    name = path.name
    try:
        fields = Fields(parse_object(read_small_file(path.parent, name), name), name)
        fields.integer("format", minimum=1, maximum=1)
        return ClusterShape(
            num_slices=fields.integer("num_slices", minimum=1, maximum=MAX_PLAN_SLICES),
            num_replicas=fields.integer("num_replicas", minimum=1, maximum=2**16),
            partition=Partition(
                num_stages=fields.integer("num_stages", minimum=1, maximum=2**16, default=1),
                num_ranks=fields.integer("num_ranks", minimum=1, maximum=2**16, default=1),
            ),
            units=_units(fields.find("hosts"), name),
        )
    except CheckpointError as error:
        raise ConfigError(error.message) from None


def _units(hosts: object, file: str) -> dict[str, tuple[Unit, ...]]:
    if not isinstance(hosts, dict):
        raise fault(file, f"hosts is {shown(hosts)}; an object of host → [[layer, expert, slice], …] is expected")
    units: dict[str, tuple[Unit, ...]] = {}
    for host, listed in hosts.items():
        if not isinstance(listed, list) or not all(_is_unit(unit) for unit in listed):
            raise fault(file, f"hosts.{shown(host)} is no list of [layer, expert, slice]")
        units[host] = tuple((layer, expert, number) for layer, expert, number in listed)
    return units


def _is_unit(unit: object) -> bool:
    return isinstance(unit, list) and len(unit) == 3 and all(type(number) is int for number in unit)
