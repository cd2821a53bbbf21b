"""A member of an attention group: a range of layers, a rank's part of each, links to every expert host; no Ray."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

import torch

from cluster.data_plane.epochs import Epochs
from cluster.data_plane.stage_door import StageDoor
from cluster.data_plane.topology_follower import follower_of
from cluster.presence import Presence
from cluster.reading import StageReading
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
from llama4_dist.dispatch.stats import DispatchCounters
from llama4_dist.engine.build import resolve_dtype
from llama4_dist.engine.devices import load_member
from llama4_dist.engine.members_plan import MembersPlan, plan_members
from llama4_dist.engine.memory import memory_bytes
from llama4_dist.errors import UnavailableError
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.reduction import Reduction
from llama4_dist.native import threads
from llama4_dist.stages.collective import ProcessRanks
from llama4_dist.stages.links.member import MemberRules, ProcessMember
from llama4_dist.stages.links.output_codec import OutputRules
from llama4_dist.stages.links.plan_codec import PlanRules
from llama4_dist.stages.member import StageRunner
from llama4_dist.telemetry import tracing

T = TypeVar("T")

FORM_TIMEOUT_S = 30.0  # for all to meet, once each was told
SWITCH_TIMEOUT_S = 120.0  # for a part to end before a table is switched


class StageWorker:
    """One member: `load`, `connect` and `publish` a topology; `prepare` and `form` as often as the group is formed."""

    def __init__(self, config: WorkerConfig, location: Location) -> None:
        self._config = config
        self._presence = Presence(worker=config.worker, role=config.role, location=location)
        self._epochs = Epochs()
        self._forming = threading.Lock()
        self._door: StageDoor | None = None
        self._member: ProcessMember | None = None
        self._cache: KVCache | None = None
        self._resources = ExitStack()

    @property
    def epoch(self) -> int:
        """The epoch in use."""
        return self._epochs.epoch

    def location(self) -> Location:
        """Say where this worker runs."""
        return self._presence.location

    def load(self) -> None:
        """Read this member's share of the weights and listen, without any expert host or neighbour yet."""
        config = self._config
        self._presence.state = State.LOADING
        threads.set_count(config.num_threads)
        checkpoint = self._checkpoint = Checkpoint.open(config.model_dir)
        self._resources.callback(checkpoint.close)
        dtype = resolve_dtype(config.dtype, checkpoint.config.dtype)
        self._plan = self._planned(None)
        share = self._plan.share(config.stage, config.rank)
        device = torch.device(config.device)
        apart = ProcessRanks(None, rank=config.rank, num_ranks=share.num_ranks, device=device)
        self._model = load_member(
            checkpoint,
            share=share,
            reduction=Reduction(apart) if share.num_ranks > 1 else None,
            dtype=dtype,
            device=config.device,
            weight_format=config.weights,
            progress=self._presence.note_loaded,
        )
        if is_native(dtype, config.device):
            threads.leave_to_native()
        self._plan = self._planned(None)  # again: what weights take of a device's memory no page has
        follower = self._follower = follower_of(
            config,
            checkpoint,
            self._epochs,
            incarnation=self._presence.incarnation,
            node=self._presence.location.node,
            device=config.device,
            between_steps=self._between_parts,
        )
        self._resources.callback(follower.dispatcher.close)
        door = StageDoor(config, self._presence.location, self._presence.incarnation)
        self._resources.callback(door.close)
        member = ProcessMember(share, door.door, device=config.device)
        self._resources.callback(member.close)
        self._resources.callback(follower.close)
        self._door, self._member = door, member
        self._presence.state = State.READY

    def connect(self, hosts: Mapping[str, HostAddress]) -> None:
        """Do what `TopologyFollower.connect` does."""
        self._follower.connect(hosts)

    def publish(self, topology: Topology) -> Adopted:
        """Do what `TopologyFollower.publish` does; members of a group may follow different epochs for a moment."""
        return self._follower.publish(topology)

    def topology(self, controller: int = 0) -> Topology | None:
        """Do what an attention worker's `topology` does."""
        return self._epochs.claim(controller)

    def prepare(self, number: int) -> StageAddress:
        """Leave the group there was and say where the others of formation `number` reach this member.

        Raises PreconditionError (STALE_FORMATION) for a number that is not newer, UnavailableError (MEMBER_STUCK) where
        the part under way does not end: then only another process can take this one's place.
        """
        with self._forming:
            door, member = self._ready()
            door.next(number)
            member.leave()
            return door.address(self._plan.num_pages)

    def form(self, formation: Formation) -> None:
        """Meet the others and compute what the leader plans, with the weights read before and an empty cache.

        Raises PreconditionError for a formation that was not prepared, HandshakeError where another process does not
        fit, UnavailableError (WORKER_LOST) where one does not come.
        """
        with self._forming:
            door, member = self._ready()
            door.check(formation)
            identity = door.identity(self._checkpoint, formation)
            runner = self._runner(formation)
            rules, neighbours = self._rules(), door.neighbours(formation)
            member.join(identity, runner, rules, neighbours, deadline=time.monotonic() + FORM_TIMEOUT_S)

    def progress(self) -> LoadProgress:
        """Say how many layers are loaded."""
        return self._presence.progress()

    def reading(self) -> StageReading:
        """Return what is measured of this member; UnavailableError before it has loaded."""
        _, member = self._ready()
        config, record = self._config, member.record
        return StageReading(
            worker=config.worker,
            group=config.group,
            stage=config.stage,
            rank=config.rank,
            dispatch=DispatchCounters(**self._follower.dispatcher.stats().told()),
            parts=record.num_parts,
            busy_s=record.busy_s,
            starved_s=record.starved_s,
        )

    def status(self) -> WorkerStatus:
        """Describe this worker."""
        config, door, member = self._config, self._door, self._member
        status = self._presence.status(
            epoch=self._epochs.epoch,
            group=config.group,
            stage=config.stage,
            rank=config.rank,
        )
        if door is None or member is None:
            return status
        layers = self._plan.share(config.stage, config.rank).layers
        return replace(
            status,
            addresses=door.addresses,
            layers=(layers.start, layers.stop),
            formation=member.formation,
            last_formation=door.number,
        )

    def close(self) -> None:
        """Leave the group, end the thread and the links; what was traced is sent."""
        self._resources.close()
        tracing.flush()

    def _ready(self) -> tuple[StageDoor, ProcessMember]:
        if self._door is None or self._member is None:
            raise UnavailableError(f"{self._config.worker} has not loaded: call `load` first")
        return self._door, self._member

    def _runner(self, formation: Formation) -> StageRunner:
        """Return what computes with as many pages as all members have room for; their keys are void."""
        if self._cache is None or self._cache.num_pages != formation.num_pages:
            plan = self._planned(formation.num_pages)
            share = plan.share(self._config.stage, self._config.rank)
            self._cache = plan.cache(self._checkpoint, share, device=self._config.device)
            self._computing = StageRunner(self._model, self._cache, self._follower.dispatcher)
        return self._computing

    def _planned(self, num_pages: int | None) -> MembersPlan:
        config = self._config
        options = config.options if num_pages is None else replace(config.options, num_blocks=num_pages)
        # A node's memory is the whole group's, if it comes to that; a device is a member's own.
        num_sharing = config.partition.num_members if torch.device(config.device).type == "cpu" else 1
        return plan_members(
            self._checkpoint,
            config.partition,
            options,
            dtype=resolve_dtype(config.dtype, self._checkpoint.config.dtype),
            device=config.device,
            memory_bytes=memory_bytes(config.device) // num_sharing,
        )

    def _rules(self) -> MemberRules:
        config, geometry = self._config, self._checkpoint.config
        max_tokens = config.options.max_num_batched_tokens
        assert self._cache is not None, "the runner has one"
        plans = PlanRules(
            vocab_size=geometry.vocab_size,
            max_tokens=max_tokens,
            num_pages=self._cache.num_pages,
            block_size=config.options.block_size,
            groups=self._plan.layouts[config.stage].groups,
        )
        return MemberRules(plans=plans, rows=OutputRules(width=geometry.hidden_size, max_rows=max_tokens))

    def _between_parts(self, action: Callable[[], T]) -> T:
        member = self._member
        return action() if member is None else member.loop.do(action, timeout_s=SWITCH_TIMEOUT_S)
