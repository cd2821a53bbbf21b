"""The engine port over a whole cluster of Ray actors: a controller, expert hosts, attention workers on gRPC streams."""

import atexit
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from cluster.driver.driver_control import DriverControl
from cluster.driver.launch import ensure_ray
from cluster.driver.processes import ClusterProcesses, OnProgress
from cluster.driver.socket_folder import socket_folder
from cluster.driver.spawn import RaySpawner
from cluster.plan import ClusterPlan, stages_of
from cluster.planning.autoscale import AutoscalePolicy
from cluster.planning.placement import ExpertGeometry
from cluster.worker import Role, WorkerConfig, WorkerStatus
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.build import resolve_dtype
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.port import EngineStats, OnOutputs
from llama4_dist.errors import ConfigError
from llama4_dist.model.expert_cut import ExpertCut
from llama4_dist.model.weight_format import STORED, check_weight_format_name
from llama4_dist.partition import WHOLE, Partition
from llama4_dist.request import EngineLimits, EngineRequest
from llama4_dist.rpc.cluster_secret import cluster_secret
from llama4_dist.rpc.directory import DirectoryServer
from llama4_dist.rpc.remote_group import RemoteGroup
from llama4_dist.telemetry.settings import DEFAULT, Telemetry

LONGEST_SOCKET = "attention-99.99.99-1764200000000.sock"  # of a worker


class RayEngine:
    """An `Engine`. The constructor returns when the cluster serves; `close` leaves no process, actor or file behind.

    `ray_address` None starts a Ray on this machine; else the cluster there is joined, and the checkpoint must lie at
    the same path on every node. `labels` maps a role to the node labels its workers demand. Every expert is cut into
    `expert_slices`, which hosts hold one by one; tokens have the bits of a single process of so many.
    `host_capacity_bytes` bounds the expert weights of one host, `expert_memory_bytes` those of them that stay in
    memory; `pool_window_s` is how long it lets rows wait for other attention workers' rows; `wire` is how rows travel,
    see `dispatch/links/wire.py`; `weights` is "stored" or "int8". `num_threads` are an attention worker's,
    `expert_threads` a host's. A worker waits `placement_timeout_s` for room on a node, with `demand_roles` on one that
    offers its role's resource; all together have `start_timeout_s` to load. Tests strike the hosts of an `armable`
    cluster. `telemetry` is how its processes log and trace.
    """

    def __init__(  # noqa: PLR0913 - the settings of a cluster
        self,
        model_dir: Path | str,
        *,
        num_expert_hosts: int,
        num_attention_workers: int = 1,
        dtype: str = "auto",
        weights: str = STORED,
        expert_slices: int = 1,
        device: str = "cpu",
        options: EngineOptions | None = None,
        ray_address: str | None = None,
        num_replicas: int = 2,
        num_threads: int | None = None,
        expert_threads: int = 1,
        host_capacity_bytes: int | None = None,
        expert_memory_bytes: int | None = None,
        pool_window_s: float = 0.0,
        wire: str = "",
        labels: Mapping[Role, Mapping[str, str]] | None = None,
        progress: OnProgress | None = None,
        start_timeout_s: float = 300.0,
        placement_timeout_s: float | None = None,
        demand_roles: bool = False,
        resume_ttl_s: float = 10.0,
        replay_timeout_s: float = 30.0,
        autoscale: AutoscalePolicy | None = None,
        armable: bool = False,
        partition: Partition = WHOLE,
        secret: bytes | None = None,
        directory: DirectoryServer | None = None,
        telemetry: Telemetry = DEFAULT,
    ) -> None:
        model_dir = Path(model_dir).resolve()
        check_weight_format_name(weights, device)  # whether there is a compiler each worker says for its own node
        geometry = read_geometry(model_dir, dtype, weights, expert_slices, device)
        check_cut(model_dir, partition)
        secret, run_id = secret or cluster_secret(), f"llama4-{secrets.token_hex(4)}"
        run_dir = socket_folder(f"{run_id}/{LONGEST_SOCKET}") / run_id

        def configs(role: Role, count: int, threads: int) -> tuple[WorkerConfig, ...]:
            return tuple(
                WorkerConfig(
                    worker=f"{role}-{index}",
                    role=role,
                    model_dir=model_dir,
                    dtype=dtype,
                    weights=weights,
                    expert_slices=expert_slices,
                    device=device,
                    num_threads=threads,
                    run_dir=run_dir,
                    secret=secret,
                    options=options or EngineOptions(model_name=model_dir.name),
                    capacity_bytes=host_capacity_bytes,
                    expert_memory_bytes=expert_memory_bytes,
                    pool_window_s=pool_window_s,
                    wire=wire,
                    resume_ttl_s=resume_ttl_s,
                    armable=armable,
                    partition=partition if role is Role.ATTENTION else WHOLE,
                    telemetry=telemetry,
                )
                for index in range(count)
            )

        threads = num_threads or default_threads(num_attention_workers * partition.num_members)
        attention = configs(Role.ATTENTION, num_attention_workers, threads if partition == WHOLE else 1)

        plan = ClusterPlan(
            model=(options.model_name if options else None) or model_dir.name,
            geometry=geometry,
            experts=configs(Role.EXPERT, num_expert_hosts, expert_threads),
            attention=attention,
            stages=tuple(stage for leader in attention for stage in stages_of(leader, num_threads=threads)),
            num_replicas=num_replicas,
            host_capacity_bytes=host_capacity_bytes,
            autoscale=autoscale,
            telemetry=telemetry,
        )
        self._directory = directory
        with ExitStack() as resources:
            resources.callback(ensure_ray(ray_address).close)
            resources.callback(shutil.rmtree, run_dir, ignore_errors=True)
            spawner = RaySpawner(
                run_id=run_id,
                labels=labels,
                tell_autoscaler=ray_address is not None,
                placement_timeout_s=placement_timeout_s,
                demand_roles=demand_roles,
            )
            self._processes = ClusterProcesses(plan, spawner, progress=progress, on_engines=self._use_engines)
            resources.callback(self._processes.close)
            self.control = DriverControl(self._processes)
            addresses = self._processes.start(timeout_s=start_timeout_s)
            self._remote = RemoteGroup(addresses, secret=secret, replay_timeout_s=replay_timeout_s)
            self._group = self._remote.group
            resources.callback(self._remote.close)
            if directory is not None:
                directory.set(addresses)
            self._resources = resources.pop_all()
        atexit.register(self.close)  # Ray would end the workers, but not remove their sockets

    @property
    def limits(self) -> EngineLimits:
        """What the smallest attention worker takes."""
        return self._group.limits

    def start(self, on_outputs: OnOutputs) -> None:
        """Open the streams to the attention workers."""
        self._group.start(on_outputs)

    def submit(self, request: EngineRequest) -> None:
        """Give a request to the least loaded attention worker."""
        self._group.submit(request)

    def attach(self, request: EngineRequest) -> None:
        """Take over a request whose gateway is gone."""
        self._group.attach(request)

    def abort(self, request_id: str) -> None:
        """Cancel a request."""
        self._group.abort(request_id)

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        """Return float32 logits_TV of every position."""
        return self._group.score(token_ids, chunk_size=chunk_size)

    def stats(self) -> EngineStats:
        """Return the sum over the attention workers."""
        return self._group.stats()

    def stats_by_worker(self) -> Mapping[str, EngineStats | None]:
        """Return each attention worker's counters; None for one that does not answer."""
        return self._group.stats_by_worker()

    def replays(self) -> Mapping[str, int]:
        """Return how many requests went on elsewhere, by the attention worker that was lost."""
        return self._group.replays()

    def status(self) -> tuple[WorkerStatus, ...]:
        """Describe the controller and every worker; UnavailableError when the controller is gone."""
        return self.control.view().workers

    def arm(self, worker: str, point: str, *, after: int = 1, action: str = "kill") -> None:
        """Let an expert host of an `armable` cluster be struck at its `after`-th passing of a fault point."""
        self._processes.ask_worker(worker, "arm", point, after, action)

    def _use_engines(self, addresses: Mapping[str, str]) -> bool:
        """Let the group, and gateways of other processes, know who serves now; return whether all could be reached."""
        if self._directory is not None:
            self._directory.set(addresses)
        return self._remote.follow(addresses)

    def close(self) -> None:
        """End streams, controller, workers, placement groups and, if it was started here, Ray."""
        atexit.unregister(self.close)
        self._resources.close()


def check_cut(model_dir: Path, partition: Partition) -> None:
    """Raise ConfigError, before any process starts, where a checkpoint's model cannot be cut so."""
    checkpoint = Checkpoint.open(model_dir)
    try:
        checkpoint.shares_of(partition)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    finally:
        checkpoint.close()


def default_threads(num_workers: int) -> int:
    """Share this machine's cores among the attention workers: their matrices are large enough for two to eight."""
    return max(1, min(8, os.cpu_count() or 1) // max(1, num_workers))


def read_geometry(
    model_dir: Path, dtype: str, weights: str = STORED, expert_slices: int = 1, device: str = "cpu"
) -> ExpertGeometry:
    """Read what is to be placed from the checkpoint's headers; ConfigError for a cut that does not fit."""
    checkpoint = Checkpoint.open(model_dir)
    try:
        config = checkpoint.config
        cut_into = partial(
            ExpertCut.of,
            checkpoint,
            dtype=resolve_dtype(dtype, config.dtype),
            device=device,
            weight_format=weights,
        )
        return ExpertGeometry(
            moe_layers=config.moe_layer_ids,
            num_experts=config.num_experts,
            expert_width=config.expert_width,
            expert_bytes=cut_into(num_slices=1).most_bytes,
            num_slices=expert_slices,
            slice_bytes=cut_into(num_slices=expert_slices).most_bytes,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    finally:
        checkpoint.close()
