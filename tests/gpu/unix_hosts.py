"""Expert hosts of a cluster behind Unix sockets, and an engine over them, without Ray and without gRPC."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cluster.data_plane.expert_host import ExpertHost
from cluster.worker import Location, Role, WorkerConfig
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.dispatch.dispatcher import DEFAULT_DEADLINES, Dispatcher
from llama4_dist.dispatch.handshake import Hello
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import DTYPES, Link, LinkLimits, dtype_name
from llama4_dist.dispatch.reply_times import Deadlines
from llama4_dist.dispatch.routing_table import Replica, RoutingTable
from llama4_dist.engine.build import build_engine
from llama4_dist.engine.devices import arithmetic, rows_device
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.options import EngineOptions

Pair = tuple[int, int]
SECRET = b"0123456789abcdef0123456789abcdef"
CONNECT_TIMEOUT_S = 10.0


def new_host(name: str, model_dir: Path, run_dir: Path, *, dtype: str, device: str) -> ExpertHost:
    """Return a host that has loaded nothing yet; `run_dir` is where its socket will be."""
    config = WorkerConfig(
        worker=name,
        role=Role.EXPERT,
        model_dir=model_dir,
        dtype=dtype,
        device=device,
        num_threads=1,
        run_dir=run_dir,
        secret=SECRET,
    )
    return ExpertHost(config, Location(node="here", address="127.0.0.1"))


def spread(config: ModelConfig, hosts: Sequence[str], *, turned_by: int = 0) -> dict[str, list[Pair]]:
    """Give each host every so-manieth expert, beginning with another one for another `turned_by`."""
    pairs: dict[str, list[Pair]] = {host: [] for host in hosts}
    for layer in config.moe_layer_ids:
        for expert in range(config.num_experts):
            pairs[hosts[(expert + turned_by) % len(hosts)]].append((layer, expert))
    return pairs


def table_of(
    config: ModelConfig, pairs: Mapping[str, Sequence[Pair]], incarnations: Mapping[str, int], *, epoch: int = 1
) -> RoutingTable:
    """Return the table in which each host holds these pairs whole."""
    replicas = {pair: (Replica(host, incarnations[host]),) for host, held in pairs.items() for pair in held}
    return RoutingTable(epoch=epoch, replicas=replicas)


def dispatcher_over(
    hello: Hello,
    addresses: Mapping[str, tuple[str, int]],
    table: RoutingTable,
    *,
    device: str,
    deadlines: Deadlines = DEFAULT_DEADLINES,
) -> Dispatcher:
    """Dial the hosts as `hello` and return a dispatcher; `addresses` name a host's socket and incarnation."""
    dtype = DTYPES[hello.dtype]
    links: dict[str, Link] = {
        host: connect(address, hello=hello, secret=SECRET, limits=LinkLimits(), timeout_s=CONNECT_TIMEOUT_S)
        for host, (address, _) in addresses.items()
    }
    return Dispatcher(
        worker=hello.id,
        incarnation=hello.incarnation,
        table=table,
        links=links,
        width=hello.width,
        dtype=dtype,
        device=rows_device(dtype, device),
        deadlines=deadlines,
    )


def engine_over(
    checkpoint: Checkpoint,
    addresses: Mapping[str, tuple[str, int]],
    pairs: Mapping[str, Sequence[Pair]],
    *,
    dtype: torch.dtype,
    device: str,
    options: EngineOptions,
    deadlines: Deadlines = DEFAULT_DEADLINES,
) -> LocalEngine:
    """Return an engine whose attention is computed on `device`, over hosts that hold these pairs."""
    config = checkpoint.config
    hello = Hello(
        role="attention",
        id="a0",
        incarnation=1,
        model_hash=checkpoint.model_hash,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        width=config.hidden_size,
        dtype=dtype_name(dtype),
        arithmetic=arithmetic(dtype, device),
    )
    table = table_of(config, pairs, {host: incarnation for host, (_, incarnation) in addresses.items()})
    dispatcher = dispatcher_over(hello, addresses, table, device=device, deadlines=deadlines)
    engine = build_engine(checkpoint, dispatcher, options=options, dtype=dtype, device=device)
    engine.on_close = dispatcher.close
    return engine
