"""The leader's side of a formation whose members are other processes: ways to all, outputs of the last stage."""

from collections.abc import Callable, Mapping, Sequence

from llama4_dist.errors import UnavailableError
from llama4_dist.partition import Partition
from llama4_dist.stages.links.dial import Target
from llama4_dist.stages.links.door import Door
from llama4_dist.stages.links.hello import GroupIdentity, Purpose
from llama4_dist.stages.links.joining import meet
from llama4_dist.stages.links.link import StageLink
from llama4_dist.stages.links.meeting import Meeting, Place, expected_of_leader
from llama4_dist.stages.links.output_codec import OutputRules
from llama4_dist.stages.links.ports import OutputInlet, PlanEncoder, PlanSender
from llama4_dist.stages.ports import TIMEOUT_S


class LedGroup:
    """One formation: `plans` and `outputs` are what a `PipelinedModel` is reset with. `lost` says why it is over."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.plans: list[PlanSender] = []
        self.outputs: list[OutputInlet] = []
        self.lost: UnavailableError | None = None
        self.links: list[StageLink] = []

    def close(self) -> None:
        """Hang up on all members."""
        for link in self.links:
            link.close()


def lead_group(
    identity: GroupIdentity,
    partition: Partition,
    door: Door,
    members: Sequence[Target],
    logits: Sequence[OutputRules],
    *,
    deadline: float,
    on_lost: Callable[[LedGroup], None] = lambda group: None,
    timeout_s: float = TIMEOUT_S,
) -> LedGroup:
    """Meet the members, which are given in the order of `partition.places`; `logits` is what each last rank sends.

    `on_lost` is told, in a link's own thread, when a link goes down. Raises HandshakeError or WORKER_LOST.
    """
    num_stages, num_ranks = partition.num_stages, partition.num_ranks
    group = LedGroup(identity.formation)
    meeting = Meeting(identity, stage=num_stages, rank=0, expected=expected_of_leader(num_stages, num_ranks))
    dials: Mapping[Place, Target] = {(Purpose.PLANS, stage, rank): (at, stage, rank) for at, stage, rank in members}
    connections = meet(door, meeting, dials, deadline=deadline)

    def lose(error: UnavailableError) -> None:
        is_first, group.lost = group.lost is None, group.lost or error
        if is_first:
            on_lost(group)

    encoder = PlanEncoder()
    for place in dials:
        link = StageLink(
            connections[place], f"stage-{place[1]}-rank-{place[2]}", on_lost=lose, send_timeout_s=timeout_s
        )
        group.links.append(link)
        group.plans.append(PlanSender(link, encoder))
    for rank, rules in enumerate(logits):
        inlet = OutputInlet(rules, "cpu")

        def lose_outputs(error: UnavailableError, inlet: OutputInlet = inlet) -> None:
            inlet.lose(error)
            lose(error)

        link = StageLink(
            connections[Purpose.OUTPUTS, num_stages - 1, rank],
            f"outputs-of-rank-{rank}",
            bounds=inlet.bounds,
            deliver=inlet.deliver,
            on_lost=lose_outputs,
        )
        group.links.append(link)
        group.outputs.append(inlet)
    for link in group.links:
        link.start()
    return group
