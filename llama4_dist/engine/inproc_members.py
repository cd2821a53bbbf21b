"""Puts an attention group together in one process: members in threads, each with its layers, keys and expert hosts."""

from collections.abc import Callable
from contextlib import ExitStack

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.devices import load_member
from llama4_dist.engine.inproc_hosts import start_inproc_hosts
from llama4_dist.engine.members_plan import MembersPlan
from llama4_dist.model.reduction import Reduction
from llama4_dist.stages.in_process import start_group, thread_ranks
from llama4_dist.stages.member import StageRunner
from llama4_dist.stages.pipeline import PipelinedModel

Progress = Callable[[int, int], None]


def start_inproc_members(  # noqa: PLR0913 - what `build_single_process` was asked for
    checkpoint: Checkpoint,
    plan: MembersPlan,
    *,
    num_hosts: int,
    device: str,
    weights: str,
    resources: ExitStack,
    num_slices: int = 1,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> PipelinedModel:
    """Start the members of a group, each with `num_hosts` expert hosts of its own, and return the leader's model.

    `num_slices` and `memory_bytes` are those of `start_inproc_hosts`; the members share the memory. `progress` is
    told (layers read, layers in all), both summed over the members.
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
        dispatcher, _ = start_inproc_hosts(
            checkpoint,
            num_hosts=num_hosts,
            dtype=plan.dtype,
            device=device,
            weights=weights,
            num_slices=num_slices,
            memory_bytes=None if memory_bytes is None else memory_bytes // partition.num_members,
            resources=resources,
            worker=f"local-{stage}-{rank}",
            share=share,
        )
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
