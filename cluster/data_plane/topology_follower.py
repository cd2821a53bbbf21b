"""Follows topologies with a dispatcher: dials hosts, switches tables between two steps, dials again what was lost.

Attention workers and members of attention groups are followers; what a step is they know themselves.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from cluster.data_plane.epochs import Epochs
from cluster.data_plane.host_links import Dial, HostLinks
from cluster.data_plane.referee import Referee
from cluster.planning.placement import routing_table
from cluster.worker import Adopted, HostAddress, Topology, WorkerConfig
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.cross_check import CrossCheck
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.handshake import Hello
from llama4_dist.dispatch.handshake import Role as LinkRole
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import Link, LinkLimits, dtype_name
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.engine.build import resolve_dtype
from llama4_dist.engine.devices import arithmetic

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0


class BetweenSteps(Protocol):
    """Runs an action that changes routes while no step runs, and returns its result."""

    def __call__(self, action: Callable[[], T]) -> T: ...


OnLost = Callable[[str, int, str], None]  # host, incarnation, reason


class TopologyFollower:
    """A dispatcher whose links and table follow what is published. `close` before the dispatcher is closed."""

    def __init__(
        self,
        worker: str,
        epochs: Epochs,
        *,
        dispatcher_of: Callable[[OnLost], Dispatcher],
        dial: Dial,
        between_steps: BetweenSteps,
        num_slices: int = 1,
    ) -> None:
        self.epochs = epochs
        self.links = HostLinks(dial, self._restore)
        self.dispatcher = dispatcher_of(self.links.lost)
        self._worker = worker
        self._between_steps = between_steps
        self._num_slices = num_slices

    def connect(self, hosts: Mapping[str, HostAddress]) -> None:
        """Dial hosts that a topology to come will name; raises HandshakeError or LinkDownError where one refuses."""
        self.links.connect(hosts, self.dispatcher.links)

    def publish(self, topology: Topology) -> Adopted:
        """Switch to a topology between two steps; when this returns nothing is in flight to the old places.

        A host that cannot be reached counts as lost, and is dialled again. Raises PreconditionError for an epoch that
        is not newer, and for one of a controller that another has taken over from: whoever publishes it has missed
        something.
        """
        with self.epochs.publishing:
            self.epochs.check(topology)
            incarnations = {host: address.incarnation for host, address in topology.hosts.items()}
            table = routing_table(
                topology.placement,
                epoch=topology.epoch,
                incarnations=incarnations,
                num_slices=self._num_slices,
            )
            in_use = dict(self.dispatcher.links)
            taken = self.links.take(topology.hosts, in_use)

            def switch() -> float:
                begun_s = time.perf_counter()
                links = usable(taken, in_use, self.dispatcher.links, incarnations)
                self.dispatcher.switch(table, links)
                for host, link in taken.items():
                    if links.get(host) is not link:
                        link.abort()
                for host in incarnations.keys() - links.keys():
                    self.links.lost(host, incarnations[host], "NOT_REACHED")
                return time.perf_counter() - begun_s

            switch_s = self._between_steps(switch)
            self.epochs.note(topology)
        log.info("topology_adopted worker=%s epoch=%d hosts=%d", self._worker, topology.epoch, len(taken))
        return Adopted(epoch=topology.epoch, switch_s=switch_s)

    def close(self) -> None:
        """Stop dialling."""
        self.links.close()

    def _restore(self, link: Link) -> None:
        """Use a link to a host that was lost."""

        def switch() -> None:
            dispatcher = self.dispatcher
            if (
                dispatcher.published.incarnations.get(link.peer) != link.peer_incarnation
                or link.peer in dispatcher.links
            ):
                link.abort()  # another topology was published meanwhile, or another link is up
                return
            dispatcher.switch(dispatcher.published, {**dispatcher.links, link.peer: link})

        self._between_steps(switch)


def follower_of(
    config: WorkerConfig,
    checkpoint: Checkpoint,
    epochs: Epochs,
    *,
    incarnation: int,
    node: str,
    device: str,
    between_steps: BetweenSteps,
) -> TopologyFollower:
    """Return the follower of a worker on `node`, whose dispatcher is given rows on `device`."""
    geometry = checkpoint.config
    dtype = resolve_dtype(config.dtype, geometry.dtype)
    hello = Hello(
        role=LinkRole.ATTENTION,
        id=config.worker,
        incarnation=incarnation,
        model_hash=checkpoint.model_hash,
        num_layers=geometry.num_layers,
        num_experts=geometry.num_experts,
        num_slices=config.expert_slices,
        width=geometry.hidden_size,
        dtype=dtype_name(dtype),
        wire=config.wire,
        arithmetic=arithmetic(dtype, config.device, config.weights),
    )

    def dial(address: HostAddress) -> Link:
        return connect(
            address.seen_from(node),
            hello=hello,
            secret=config.secret,
            limits=LinkLimits(),
            timeout_s=CONNECT_TIMEOUT_S,
        )

    def dispatcher_of(on_lost: OnLost) -> Dispatcher:
        referee = Referee(
            checkpoint,
            dtype=dtype,
            device=config.device,
            weights=config.weights,
            num_slices=config.expert_slices,
            wire=config.wire,
        )
        return Dispatcher(
            worker=config.worker,
            incarnation=incarnation,
            table=RoutingTable(epoch=0, replicas={}),
            links={},
            width=geometry.hidden_size,
            dtype=dtype,
            device=device,
            checks=CrossCheck(every=config.cross_check_every, referee=referee),
            on_lost=on_lost,
        )

    return TopologyFollower(
        config.worker,
        epochs,
        dispatcher_of=dispatcher_of,
        dial=dial,
        between_steps=between_steps,
        num_slices=config.expert_slices,
    )


def usable(
    taken: Mapping[str, Link],
    in_use_then: Mapping[str, Link],
    in_use_now: Mapping[str, Link],
    incarnations: Mapping[str, int],
) -> dict[str, Link]:
    """Return the links that a new table can use, given those taken for it while steps ran on.

    One that was in use then and is no more has gone down since; one that is in use now was restored since.
    """
    links = {
        host: link for host, link in taken.items() if in_use_then.get(host) is not link or in_use_now.get(host) is link
    }
    restored = {host: link for host, link in in_use_now.items() if incarnations.get(host) == link.peer_incarnation}
    return links | restored
