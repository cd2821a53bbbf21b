"""The leader of an attention group: scheduler, pages, sampler and the gRPC service; it computes no layer; no Ray."""

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from cluster.data_plane.epochs import Epochs
from cluster.data_plane.serving import Serving
from cluster.data_plane.stage_door import StageDoor
from cluster.presence import Presence
from cluster.worker import (
    Adopted,
    Formation,
    HostAddress,
    LoadProgress,
    Location,
    StageAddress,
    State,
    Topology,
    WorkerConfig,
    WorkerStatus,
)
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.build import lead, resolve_dtype
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.members_plan import MembersPlan, plan_members
from llama4_dist.errors import UnavailableError
from llama4_dist.native import threads
from llama4_dist.stages.links.leader import LedGroup, lead_group
from llama4_dist.stages.links.output_codec import OutputRules
from llama4_dist.stages.pipeline import PipelinedModel
from llama4_dist.stages.ports import worker_lost
from llama4_dist.telemetry import tracing

log = logging.getLogger(__name__)

FORM_TIMEOUT_S = 30.0  # for all to meet, once each was told


class GroupLeader:
    """What `AttentionWorker` is for a model that is cut: `load`, `prepare` and `form`, `serve`.

    It follows topologies only to tell a controller that takes over: it sends no rows.
    """

    def __init__(self, config: WorkerConfig, location: Location) -> None:
        self._config = config
        self._presence = Presence(worker=config.worker, role=config.role, location=location)
        self._epochs = Epochs()
        self._serving = Serving(config, location)
        self._forming = threading.Lock()
        self._door: StageDoor | None = None
        self._engine: LocalEngine | None = None
        self._num_pages = 0  # as many as its engine counts
        self._group: LedGroup | None = None
        self._resources = ExitStack()

    @property
    def epoch(self) -> int:
        """The epoch in use."""
        return self._epochs.epoch

    def location(self) -> Location:
        """Say where this worker runs."""
        return self._presence.location

    def load(self) -> None:
        """Open the checkpoint and listen; the engine is built with the first group."""
        self._presence.state = State.LOADING
        threads.set_count(self._config.num_threads)
        self._checkpoint = Checkpoint.open(self._config.model_dir)
        self._resources.callback(self._checkpoint.close)
        self._door = StageDoor(self._config, self._presence.location, self._presence.incarnation)
        self._resources.callback(self._door.close)

    def connect(self, hosts: Mapping[str, HostAddress]) -> None:
        """Dial nobody: the members send the rows."""

    def publish(self, topology: Topology) -> Adopted:
        """Remember a topology; raises PreconditionError as an attention worker does."""
        with self._epochs.publishing:
            self._epochs.check(topology)
            self._epochs.note(topology)
        return Adopted(epoch=topology.epoch, switch_s=0.0)

    def topology(self, controller: int = 0) -> Topology | None:
        """Do what an attention worker's `topology` does."""
        return self._epochs.claim(controller)

    def prepare(self, number: int) -> StageAddress:
        """Leave the group there was and say where the members of formation `number` reach this leader.

        What runs ends with WORKER_LOST, so that it is replayed; requests wait until the group is formed.
        """
        with self._forming:
            door = self._listening()
            door.next(number)
            self._leave()
            return door.address(self._num_pages)

    def form(self, formation: Formation) -> None:
        """Meet the members and go on computing with them.

        Raises PreconditionError for a formation that was not prepared, HandshakeError where another process does not
        fit, UnavailableError (WORKER_LOST) where one does not come.
        """
        with self._forming:
            door = self._listening()
            door.check(formation)
            plan = self._planned(formation.num_pages)
            partition, num_ranks = self._config.partition, self._config.partition.num_ranks
            places = zip(formation.members, partition.places, strict=True)
            last = plan.shares[-num_ranks:]
            max_rows = self._config.options.max_num_batched_tokens
            group = lead_group(
                door.identity(self._checkpoint, formation),
                partition,
                door.door,
                [door.target(one, *place) for one, place in places],
                [OutputRules(width=len(share.vocabulary), max_rows=max_rows) for share in last],
                deadline=time.monotonic() + FORM_TIMEOUT_S,
                on_lost=self._lost,
            )
            self._use(group, plan)

    def serve(self) -> str:
        """Start the engine and its service; return the service's address. UnavailableError before the first group."""
        if self._engine is None:
            raise UnavailableError(f"{self._config.worker} leads no group yet: call `form` first")
        address = self._serving.serve(self._engine)
        self._resources.callback(self._serving.close)
        self._presence.state = State.READY
        return address

    def progress(self) -> LoadProgress:
        """Say that there is nothing to load."""
        return self._presence.progress()

    def queue_age_s(self) -> float:
        """Say how long the oldest request has waited to be admitted."""
        return 0.0 if self._engine is None else self._engine.stats().max_queue_age_s

    def status(self) -> WorkerStatus:
        """Describe this worker."""
        group, door = self._group, self._door
        return self._presence.status(
            addresses=self._serving.addresses,
            epoch=self._epochs.epoch,
            group=self._config.worker,
            formation=0 if group is None or group.lost is not None else group.number,
            last_formation=0 if door is None else door.number,
        )

    def close(self) -> None:
        """Hang up on the group, so that no step waits for it; stop service and engine, and send what was traced."""
        self._leave()
        self._resources.close()
        tracing.flush()

    def _listening(self) -> StageDoor:
        if self._door is None:
            raise UnavailableError(f"{self._config.worker} has not loaded: call `load` first")
        return self._door

    def _use(self, group: LedGroup, plan: MembersPlan) -> None:
        """Let the engine compute with a group; the first one makes the engine."""
        engine, self._group = self._engine, group
        if engine is None:
            self._model = PipelinedModel(
                group.plans,
                group.outputs,
                depth=plan.partition.num_stages,
                num_microbatches=self._config.options.num_microbatches or 1,
            )
            engine = self._engine = lead(self._checkpoint, self._model, plan, options=self._config.options)
            self._num_pages = plan.num_pages
            self._resources.callback(engine.close)
        elif self._serving.addresses:
            engine.renew(lambda: self._model.reset(group.plans, group.outputs))
        else:
            self._model.reset(group.plans, group.outputs)
        log.info("group_formed group=%s formation=%d", self._config.worker, group.number)

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        if self._engine is not None and self._serving.addresses:
            self._engine.lose(worker_lost("the group is being formed anew"))
        group.close()

    def _lost(self, group: LedGroup) -> None:
        """End what runs at once, also where no step would find out; called in a link's thread."""
        if group is not self._group or group.lost is None:
            return
        log.warning("group_lost group=%s formation=%d cause=%s", self._config.worker, group.number, group.lost)
        if self._engine is not None and self._serving.addresses:
            self._engine.lose(group.lost)

    def _planned(self, num_pages: int) -> MembersPlan:
        config = self._config
        return plan_members(
            self._checkpoint,
            config.partition,
            replace(config.options, num_blocks=num_pages),
            dtype=resolve_dtype(config.dtype, self._checkpoint.config.dtype),
            device=config.device,
            memory_bytes=0,
        )
