"""A member of a group that is a process of its own, from formation to formation. Knows no experts' topology, no Ray."""

import logging
import socket
import threading
from dataclasses import dataclass

import torch

from llama4_dist.errors import Llama4Error, UnavailableError
from llama4_dist.model.batch import Batch
from llama4_dist.partition import Share
from llama4_dist.stages.collective import ProcessRanks, join_ranks
from llama4_dist.stages.links.dial import Target
from llama4_dist.stages.links.door import Door
from llama4_dist.stages.links.hello import GroupIdentity, Purpose
from llama4_dist.stages.links.joining import meet
from llama4_dist.stages.links.link import StageLink
from llama4_dist.stages.links.loop import MemberLoop
from llama4_dist.stages.links.meeting import Meeting, Place, expected_of_member
from llama4_dist.stages.links.output_codec import OutputRules
from llama4_dist.stages.links.plan_codec import PlanRules
from llama4_dist.stages.links.ports import OutputInlet, OutputSender, deliver_plans, plan_bounds
from llama4_dist.stages.links.store import BOUNDS, LinkStore
from llama4_dist.stages.member import StageMember, StageRunner
from llama4_dist.stages.part_record import PartRecord
from llama4_dist.stages.ports import TIMEOUT_S
from llama4_dist.telemetry.tracing import ours

log = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 30.0  # as long as a part may take that is under way


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRules:
    """What a member takes from its leader and from the stage before."""

    plans: PlanRules
    rows: OutputRules


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Whom a member dials: where its outputs go, and the ranks before it. `address` is what gloo listens on."""

    after: Target
    ranks: tuple[Target, ...]
    address: str


class _Formed:
    """The links of one formation, and since when they are of no use."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.links: list[StageLink] = []
        self.member: StageMember | None = None
        self.ranks: ProcessRanks | None = None
        self.lost: Llama4Error | None = None

    def lose(self, error: Llama4Error) -> None:
        """Note that a link went down."""
        self.lost = self.lost or error

    def close(self) -> None:
        for link in self.links:
            link.close()


class ProcessMember:
    """`join` a formation after `leave`-ing the one before; both may be called by any thread, one at a time."""

    def __init__(self, share: Share, door: Door, *, device: torch.device | str, timeout_s: float = TIMEOUT_S) -> None:
        self.loop = MemberLoop(f"stage-{share.stage}-rank-{share.rank}")
        layers = f"{share.layers.start}-{share.layers.stop - 1}"
        self.record = PartRecord(ours(stage=share.stage, rank=share.rank, layers=layers))
        self._share = share
        self._door = door
        self._device = device
        self._timeout_s = timeout_s
        self._joining = threading.Lock()
        self._formed: _Formed | None = None
        self._runner: StageRunner | None = None

    @property
    def formation(self) -> int:
        """The number of the formation this member is in; 0 where it is in none, or in one that was lost."""
        formed = self._formed
        return 0 if formed is None or formed.lost is not None else formed.number

    def leave(self) -> None:
        """Hang up on the group there was; UnavailableError (MEMBER_STUCK) where the part under way does not end."""
        with self._joining:
            formed, self._formed = self._formed, None
            if formed is not None:
                formed.close()  # wakes the thread where it waits for rows, and the others where they wait for ours
            runner = self._runner
            if runner is not None:
                self.loop.do(runner.leave, timeout_s=LEAVE_TIMEOUT_S)

    def join(
        self,
        identity: GroupIdentity,
        runner: StageRunner,
        rules: MemberRules,
        neighbours: Neighbours,
        *,
        deadline: float,
    ) -> None:
        """Meet the others and compute what the leader plans, with `runner`, whose keys are void."""
        with self._joining:
            formed = _Formed(identity.formation)
            try:
                self._meet(formed, identity, runner, rules, neighbours, deadline)
                self.loop.do(lambda: runner.rejoin(formed.ranks), timeout_s=LEAVE_TIMEOUT_S)
            except BaseException:
                formed.close()
                raise
            self._runner, self._formed = runner, formed
            for link in formed.links:
                link.start()  # what came early has waited in the kernel

    def close(self) -> None:
        """End everything."""
        try:
            self.leave()
        except UnavailableError as error:
            log.warning("member_closed_while_stuck cause=%s", error)
        self.loop.close(timeout_s=1.0)

    def _meet(
        self,
        formed: _Formed,
        identity: GroupIdentity,
        runner: StageRunner,
        rules: MemberRules,
        neighbours: Neighbours,
        deadline: float,
    ) -> None:
        share, partition = self._share, self._share.partition
        meeting = Meeting(
            identity,
            stage=share.stage,
            rank=share.rank,
            expected=expected_of_member(share.stage, share.rank, partition.num_stages, partition.num_ranks),
        )
        connections = meet(self._door, meeting, _dials(neighbours), deadline=deadline)
        inlet: OutputInlet | None = None
        after: StageLink | None = None
        store = LinkStore(deadline)
        for place, connection in connections.items():
            purpose, stage, _ = place
            link: StageLink
            if purpose == Purpose.RANKS:
                link = StageLink(connection, _name(place), bounds=BOUNDS, deliver=store.deliver, on_lost=store.lose)
                store.links.append(link)
            elif purpose == Purpose.PLANS:
                link = self._plan_link(connection, formed, rules)
            elif stage == share.stage - 1:
                inlet = OutputInlet(rules.rows, self._device)
                link = self._output_link(connection, formed, place, inlet)
            else:
                link = after = self._output_link(connection, formed, place, None)
            formed.links.append(link)
        assert after is not None, "who is dialled for outputs is among the connections"
        if partition.num_ranks > 1:
            formed.ranks = self._join_ranks(formed, store, neighbours)
        formed.member = StageMember(
            runner, before=inlet, after=OutputSender(after), record=self.record, timeout_s=self._timeout_s
        )

    def _join_ranks(self, formed: _Formed, store: LinkStore, neighbours: Neighbours) -> ProcessRanks:
        for link in store.links:
            link.start()
        ranks = join_ranks(
            store,
            rank=self._share.rank,
            num_ranks=self._share.num_ranks,
            device=self._device,
            formation=formed.number,
            address=neighbours.address,
            timeout_s=self._timeout_s,
        )
        store.deadline = None  # NCCL asks again when it gathers first
        return ranks

    def _plan_link(self, connection: socket.socket, formed: _Formed, rules: MemberRules) -> StageLink:
        def lost(error: UnavailableError) -> None:
            formed.lose(error)
            self.loop.post(lambda: self._hang_up(formed))  # the other ranks may wait for one that gets no more plans

        return StageLink(
            connection,
            "leader",
            bounds=plan_bounds(),
            deliver=deliver_plans(
                rules.plans, self._device, lambda part: self.loop.post(lambda: self._compute(formed, part))
            ),
            on_lost=lost,
        )

    def _output_link(
        self, connection: socket.socket, formed: _Formed, place: Place, inlet: OutputInlet | None
    ) -> StageLink:
        def lost(error: UnavailableError) -> None:
            formed.lose(error)
            if inlet is not None:
                inlet.lose(error)

        if inlet is None:
            return StageLink(connection, _name(place), on_lost=lost, send_timeout_s=self._timeout_s)
        return StageLink(connection, _name(place), bounds=inlet.bounds, deliver=inlet.deliver, on_lost=lost)

    def _compute(self, formed: _Formed, part: Batch) -> None:
        """On the loop's thread: carry out a part of the formation of now."""
        if formed is not self._formed or formed.member is None:
            return
        try:
            formed.member.compute(part)
        except Llama4Error as error:  # nobody takes its outputs
            formed.lose(error)
            self._hang_up(formed)

    def _hang_up(self, formed: _Formed) -> None:
        """On the loop's thread: leave a formation that is of no use, so that nobody waits for this member."""
        if formed is self._formed and self._runner is not None:
            log.warning("stage_left_its_group formation=%d cause=%s", formed.number, formed.lost)
            self._runner.leave()
            formed.close()


def _dials(neighbours: Neighbours) -> dict[Place, Target]:
    after = neighbours.after
    dials: dict[Place, Target] = {(Purpose.OUTPUTS, after[1], after[2]): after}
    return dials | {(Purpose.RANKS, stage, rank): (address, stage, rank) for address, stage, rank in neighbours.ranks}


def _name(place: Place) -> str:
    purpose, stage, rank = place
    return f"{purpose}-{stage}-{rank}"
