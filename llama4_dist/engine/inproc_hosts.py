"""Starts expert hosts inside this process, behind inproc links; the cluster does it with processes and sockets."""

from contextlib import ExitStack

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.handshake import HostIdentity
from llama4_dist.dispatch.links.link import Link, LinkLimits
from llama4_dist.dispatch.routing_table import Replica, RoutingTable
from llama4_dist.engine.devices import open_experts, rows_device
from llama4_dist.errors import ConfigError
from llama4_dist.model.expert_cut import ExpertCut
from llama4_dist.model.weight_format import STORED
from llama4_dist.partition import Share

WORKER = "local"


def start_inproc_hosts(  # noqa: PLR0913 - what hosts are, all by name
    checkpoint: Checkpoint,
    *,
    num_hosts: int,
    dtype: torch.dtype,
    device: str,
    resources: ExitStack,
    weights: str = STORED,
    worker: str = WORKER,
    share: Share | None = None,
    num_slices: int = 1,
    memory_bytes: int | None = None,
) -> tuple[Dispatcher, list[ExpertServer]]:
    """Spread the experts over `num_hosts` hosts and return a dispatcher with a link to each, and the hosts.

    `weights` is their format (`model.weight_format`), `num_slices` into how many units each is cut. `memory_bytes` is
    what the hosts share to keep experts in memory; None = no bound. They belong to the thread of one `worker`, and know
    the experts of all layers, or of those of its `share`.
    """
    if num_hosts < 1:
        raise ConfigError(f"num_inproc_hosts={num_hosts} must be at least 1")
    config = checkpoint.config
    # Refused before anything starts.
    ExpertCut.of(checkpoint, dtype=dtype, device=device, weight_format=weights, num_slices=num_slices)
    host_of = {
        (layer, unit): f"e{unit % num_hosts}"
        for layer in config.moe_layer_ids
        if share is None or layer in share.layers
        for unit in range(config.num_experts * num_slices)
    }
    limits = LinkLimits()
    links: dict[str, Link] = {}
    servers: list[ExpertServer] = []
    for host in sorted(set(host_of.values())):
        experts = open_experts(
            checkpoint,
            dtype=dtype,
            device=device,
            weight_format=weights,
            num_slices=num_slices,
            residency_bytes=None if memory_bytes is None else memory_bytes // num_hosts,
        )
        experts.add([key for key, holder in host_of.items() if holder == host])
        server = ExpertServer(
            identity=HostIdentity(
                host=host,
                incarnation=0,
                model_hash=checkpoint.model_hash,
                num_layers=config.num_layers,
                num_experts=config.num_experts,
                num_slices=num_slices,
            ),
            compute=experts,
            width=config.hidden_size,
            dtype=dtype,
            limits=limits,
        )
        servers.append(server)
        links[host] = server.open_inproc(worker=worker, incarnation=0)
    replicas = {pair: (Replica(host, 0),) for pair, host in host_of.items()}
    dispatcher = Dispatcher(
        worker=worker,
        incarnation=0,
        table=RoutingTable(epoch=1, replicas=replicas, num_slices=num_slices),
        links=links,
        width=config.hidden_size,
        dtype=dtype,
        device=rows_device(dtype, device) if share is None else device,
    )
    resources.callback(dispatcher.close)
    return dispatcher, servers
