"""Puts an attention group together in one process: members in threads, each with its layers, keys and expert hosts."""

from collections.abc import Callable
from contextlib import ExitStack

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.engine.devices import load_member
from llama4_dist.engine.members_plan import MembersPlan
from llama4_dist.model.reduction import Reduction
from llama4_dist.stages.in_process import start_group, thread_ranks
from llama4_dist.stages.member import StageRunner
from llama4_dist.stages.pipeline import PipelinedModel

Progress = Callable[[int, int], None]
StartHosts = Callable[..., tuple[Dispatcher, list[ExpertServer]]]  # `start_inproc_hosts` but for worker and share


def start_inproc_members(
    checkpoint: Checkpoint,
    plan: MembersPlan,
    start_hosts: StartHosts,
    *,
    device: str,
    weights: str,
    resources: ExitStack,
    progress: Progress | None = None,
) -> PipelinedModel:
    """Start the members of a group, each with expert hosts of its own (`inproc_hosts`), and return the leader's model.

    `progress` is told (layers read, layers in all), both summed over the members.
    """
    partition = plan.partition
    num_read, num_in_all = 0, sum(len(share.layers) for share in plan.shares)
    ranks_of_stages = [thread_ranks(partition.num_ranks, device=device) for _ in plan.layouts]

    def has_read(done: int, total: int) -> None:
        nonlocal num_read
        num_read += 1
        if progress is not None:
            progress(num_read, num_in_all)

    def runner_of(stage: int, rank: int) -> StageRunner:
        share = plan.share(stage, rank)
        dispatcher, _ = start_hosts(worker=f"local-{stage}-{rank}", share=share)
        reduction = Reduction(ranks_of_stages[stage][rank]) if partition.num_ranks > 1 else None
        model = load_member(
            checkpoint,
            share=share,
            reduction=reduction,
            dtype=plan.dtype,
            device=device,
            weight_format=weights,
            progress=has_read,
        )
        cache = plan.cache(checkpoint, share, device=device)
        return StageRunner(model, cache, dispatcher)

    return start_group(partition, runner_of, resources=resources)
