"""Attention groups of the tests: threads in this process, experts computed on the spot, pages strewn over the cache."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.model.batch import PageRun
from llama4_dist.model.expert import Experts
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import KVLayout, layouts_of
from llama4_dist.model.load import load_model
from llama4_dist.model.reduction import Ranks, Reduction
from llama4_dist.partition import Partition, layers_of_stages, share_of
from llama4_dist.stages.in_process import start_group, thread_ranks
from llama4_dist.stages.member import StageRunner
from tests.model.direct import DirectDispatcher, Runner, RunningSequence, all_experts

BLOCK_SIZE = 5


class CountingDirect(DirectDispatcher):
    """With the counters that a member reads."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        self._stats = DispatchStats()

    def stats(self) -> DispatchStats:
        return self._stats


def num_pages(layout: KVLayout, num_sequences: int, max_tokens: int) -> int:
    return -(-max_tokens // BLOCK_SIZE) * len(layout.groups) * num_sequences


def stage_runner(
    checkpoint: Checkpoint,
    partition: Partition,
    stage: int,
    rank: int,
    ranks: Ranks | None,
    dispatcher: CountingDirect,
    *,
    pages: int,
    dtype: torch.dtype = torch.float32,
) -> StageRunner:
    """Load one member; `ranks` is its way to the others of its stage."""
    config = checkpoint.config
    share = share_of(config, partition, stage=stage, rank=rank)
    layout = layouts_of(config, layers_of_stages(config.num_layers, partition.num_stages))[stage]
    cache = KVCache(
        share.local(config), num_pages=pages, block_size=BLOCK_SIZE, dtype=dtype, device="cpu", layout=layout
    )
    reduction = None if ranks is None else Reduction(ranks)
    model = load_model(checkpoint, dtype=dtype, device="cpu", share=share, reduction=reduction)
    return StageRunner(model, cache, dispatcher)


def group_of_threads(
    checkpoint: Checkpoint,
    partition: Partition,
    resources: ExitStack,
    *,
    dtype: torch.dtype = torch.float32,
    num_sequences: int = 1,
    max_tokens: int = 128,
    depth: int | None = None,
    num_microbatches: int = 1,
    timeout_s: float = 60.0,
    dispatcher_of: Callable[[int, int, Experts], CountingDirect] = lambda stage, rank, experts: CountingDirect(experts),
    runners: dict[tuple[int, int], StageRunner] | None = None,
) -> Runner:
    """Start a group and return it as a runner of sequences; `runners` is filled with the members'."""
    config = checkpoint.config
    layouts = layouts_of(config, layers_of_stages(config.num_layers, partition.num_stages))
    pages = num_pages(layouts[0], num_sequences, max_tokens)
    ranks = [thread_ranks(partition.num_ranks, timeout_s=timeout_s) for _ in layouts]

    def runner_of(stage: int, rank: int) -> StageRunner:
        dispatcher = dispatcher_of(stage, rank, all_experts(checkpoint, dtype))
        to_others = ranks[stage][rank] if partition.num_ranks > 1 else None
        runner = stage_runner(checkpoint, partition, stage, rank, to_others, dispatcher, pages=pages, dtype=dtype)
        if runners is not None:
            runners[stage, rank] = runner
        return runner

    model = start_group(
        partition,
        runner_of,
        resources=resources,
        depth=depth,
        num_microbatches=num_microbatches,
        timeout_s=timeout_s,
    )
    return runner_over(model, checkpoint, layouts[0], dtype, num_sequences, max_tokens)


def runner_over(
    model: object, checkpoint: Checkpoint, layout: KVLayout, dtype: torch.dtype, num_sequences: int, max_tokens: int
) -> Runner:
    """Return a runner of sequences over a leader's model."""
    pages = num_pages(layout, num_sequences, max_tokens)
    cache = KVCache(
        checkpoint.config,
        num_pages=pages,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device="cpu",
        layout=layout.without_layers(),
    )
    nothing = CountingDirect(Experts({}, width=checkpoint.config.hidden_size, dtype=dtype, device="cpu"))
    runner = Runner(model, nothing, cache, max_tokens)  # type: ignore[arg-type]
    order = iter(torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist())
    num_blocks = -(-max_tokens // BLOCK_SIZE)
    for _ in range(num_sequences):
        runs = [PageRun(first_block=0, ids=tuple(islice(order, num_blocks))) for _ in layout.groups]
        runner.sequences.append(RunningSequence(tuple(runs)))
    return runner


@contextmanager
def running_group(checkpoint: Checkpoint, partition: Partition, **options: object) -> Iterator[Runner]:
    """Start a group and end it."""
    with ExitStack() as resources:
        yield group_of_threads(checkpoint, partition, resources, **options)  # type: ignore[arg-type]
