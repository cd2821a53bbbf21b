"""A decode step on a machine whose processes share its cores: work adds up where accelerators would overlap.

The same parts as `planner.roofline`, with two changes. Bytes and products add, because a core does one after the
other; and what overlaps (the shared expert with experts of other processes) takes at least all of its work together on
all cores. Which experts are read follows from the rows, as everywhere in the planner.
"""

from dataclasses import dataclass

from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.multinomial import expected_distinct, slowest_host, spread, zipf

BYTES = 4  # of a number: float32 weights, keys and rows


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreMachine:
    """Constants of one machine, in seconds per unit with all cores at work unless stated."""

    weight_s: float  # per byte of the attention side's weights
    expert_s: float  # per byte of a routed expert's weights
    kv_s: float  # per byte of keys and values
    flop_s: float  # per operation
    row_s: float  # per row and layer: norms, rotation, copies, router
    layer_s: float  # per layer
    sequence_s: float  # per sequence and step: planning, sampling
    step_s: float  # per step
    one_core: float  # share of the machine's rate that one core reaches
    message_s: float  # per frame to or from a host, on the attention side
    wire_s: float  # per byte of rows, each way
    stream_s: float  # per step of a cluster: tokens on their way to the driver


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreLayout:
    """`hosts` expert processes, 0 = experts in the engine's own process; threads of each kind of process."""

    cores: int
    rows: int  # sequences decoded together
    context: int
    hosts: int = 0
    slices: int = 1
    attention_threads: int = 1
    expert_threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreTerms:
    """Seconds of one step: all layers' attention, all layers' networks with their dispatch, and the rest."""

    attention_s: float
    networks_s: float
    rest_s: float

    @property
    def step_s(self) -> float:
        return self.attention_s + self.networks_s + self.rest_s


def core_step(geometry: Geometry, machine: CoreMachine, layout: CoreLayout) -> CoreTerms:
    """Return the terms of a decode step."""
    config, rows = geometry.config, layout.rows
    own = _speed(machine, layout, layout.attention_threads)
    keys = rows * geometry.keys_seen(layout.context)
    kv_bytes = keys * 2 * config.num_kv_heads * config.head_dim * BYTES
    products = 2 * rows * geometry.attention_parameters + 4 * keys * config.num_heads * config.head_dim
    attention = geometry.attention_parameters * BYTES * machine.weight_s + kv_bytes * machine.kv_s
    attention += products * machine.flop_s + rows * machine.row_s
    moe_s = _in_process(geometry, machine, layout) if layout.hosts == 0 else _cluster(geometry, machine, layout)
    dense_s = _weights_s(geometry.dense_parameters, rows, machine, machine.weight_s) / own
    head_s = _weights_s(geometry.head_parameters, rows, machine, machine.weight_s) / own
    fixed_s = machine.step_s + rows * machine.sequence_s + (machine.stream_s if layout.hosts else 0.0)
    return CoreTerms(
        attention_s=config.num_layers * (attention / own + machine.layer_s),
        networks_s=geometry.num_moe_layers * moe_s + geometry.num_dense_layers * dense_s,
        rest_s=head_s + fixed_s,
    )


def _weights_s(parameters: float, rows: float, machine: CoreMachine, byte_s: float) -> float:
    """P b byte_s + 2 B P flop_s: rows times a matrix, on all cores."""
    return parameters * (BYTES * byte_s + 2 * rows * machine.flop_s)


def _in_process(geometry: Geometry, machine: CoreMachine, layout: CoreLayout) -> float:
    own = _speed(machine, layout, layout.attention_threads)
    return (_shared_s(geometry, machine, layout) + _experts_s(geometry, machine, layout)) / own + machine.layer_s


def _cluster(geometry: Geometry, machine: CoreMachine, layout: CoreLayout) -> float:
    """R = frames + rows on the wire + max(slowest host, shared expert, all work on all cores)."""
    config = geometry.config
    shared_s, experts_s = _shared_s(geometry, machine, layout), _experts_s(geometry, machine, layout)
    speed = _speed(machine, layout, layout.expert_threads)
    popularity = zipf(config.num_experts, 0.0)
    copies = layout.rows * config.experts_per_token
    piece = geometry.expert_parameters / layout.slices
    placed = spread(popularity, layout.slices, layout.hosts)
    slowest_s = slowest_host(
        copies,
        popularity,
        placed,
        read_s=0.0,
        row_s=2 * piece * machine.flop_s / speed,
        extra_s=piece * BYTES * machine.expert_s / speed,
    ).seconds
    own = _speed(machine, layout, layout.attention_threads)
    hosts = expected_distinct(copies, (min(1.0, layout.slices / layout.hosts),) * layout.hosts)
    sent = 2 * copies * layout.slices * config.hidden_size * BYTES
    way_s = 2 * hosts * machine.message_s + sent * machine.wire_s
    return max(slowest_s, shared_s / own, shared_s + experts_s) + way_s + machine.layer_s


def _shared_s(geometry: Geometry, machine: CoreMachine, layout: CoreLayout) -> float:
    return _weights_s(geometry.expert_parameters, layout.rows, machine, machine.weight_s)


def _experts_s(geometry: Geometry, machine: CoreMachine, layout: CoreLayout) -> float:
    """Reading every expert that has rows, and computing them."""
    config, copies = geometry.config, layout.rows * geometry.config.experts_per_token
    distinct = expected_distinct(copies, zipf(config.num_experts, 0.0))
    read_s = distinct * geometry.expert_parameters * BYTES * machine.expert_s
    return read_s + 2 * copies * geometry.expert_parameters * machine.flop_s


def _speed(machine: CoreMachine, layout: CoreLayout, threads: int) -> float:
    """Return the share of the machine's rate that so many threads reach: `one_core` for one, then evenly up to 1."""
    if threads >= layout.cores:
        return 1.0
    return machine.one_core + (1.0 - machine.one_core) * (threads - 1) / (layout.cores - 1)
