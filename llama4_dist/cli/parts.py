"""What `serve` serves: an engine in this process, a cluster, or a gateway's way to a cluster of another process."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llama4_dist.cli.local import engine_of
from llama4_dist.engine.port import Engine
from llama4_dist.rpc.cluster_secret import cluster_secret
from llama4_dist.rpc.directory import DirectoryServer
from llama4_dist.rpc.directory_engine import DirectoryEngine
from llama4_dist.settings import ServeSettings, host_and_port

if TYPE_CHECKING:  # one process needs no Ray, and none is then imported
    from prometheus_client.registry import Collector

    from cluster.control import ControlPlane


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """What is served: an engine; of a cluster also its control plane, metrics, directory and secret."""

    engine: Engine
    control: "ControlPlane | None" = None
    collectors: "tuple[Collector, ...]" = ()
    directory: str = ""
    secret: bytes | None = field(default=None, repr=False)


def open_parts(settings: ServeSettings, resources: ExitStack, *, show_progress: bool) -> Parts:
    """Start what the settings ask for: one process, a cluster, or a gateway to a cluster of another process."""
    if settings.directory is not None:
        secret = cluster_secret(shared=True)
        remote = DirectoryEngine(
            settings.directory,
            secret=secret,
            timeout_s=settings.directory_timeout_s,
            replay_timeout_s=settings.replay_timeout_s,
        )
        resources.callback(remote.close)
        return Parts(engine=remote, secret=secret)
    if settings.experts == 0:
        engine = engine_of(settings, show_progress=show_progress)
        resources.callback(engine.close)
        return Parts(engine=engine)
    secret = cluster_secret(shared=settings.directory_address is not None)
    directory = None
    if settings.directory_address is not None:
        host, port = host_and_port(settings.directory_address)
        directory = DirectoryServer(host=host, port=port, secret=secret)
        resources.callback(directory.close)
    from cluster.observe.collector import ClusterCollector
    from cluster.planning.autoscale import AutoscalePolicy
    from cluster.ray_engine import RayEngine

    policy = None
    if settings.autoscale_max is not None:
        policy = AutoscalePolicy(min_hosts=settings.autoscale_min, max_hosts=settings.autoscale_max)
    cluster = engine_of(settings, show_progress=show_progress, secret=secret, directory=directory, autoscale=policy)
    resources.callback(cluster.close)
    assert isinstance(cluster, RayEngine)
    address = directory.address if directory is not None else ""
    collector = ClusterCollector(
        cluster.control.reading, cluster.control.head_answers, per_expert=settings.expert_metrics
    )
    return Parts(engine=cluster, control=cluster.control, collectors=(collector,), directory=address, secret=secret)
