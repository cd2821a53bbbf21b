"""Puts an attention group together in one process: members in threads, each with its layers, keys and expert hosts."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine import kv_sizing
from llama4_dist.engine.devices import load_member
from llama4_dist.engine.inproc_hosts import start_inproc_hosts
from llama4_dist.engine.kv_dtype import resolve_kv_dtype
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import KVLayout, layouts_of
from llama4_dist.model.reduction import Reduction
from llama4_dist.partition import Partition, Share, layers_of_stages, shares_of
from llama4_dist.stages.in_process import start_group, thread_ranks
from llama4_dist.stages.member import StageRunner
from llama4_dist.stages.pipeline import PipelinedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What every process of a group must know alike: who holds what, and how keys and values are paged.

    `layouts` are those of the stages; they number pages alike, and each of `num_pages` has a place in every member.
    """

    partition: Partition
    shares: tuple[Share, ...]  # in the order of `partition.places`
    layouts: tuple[KVLayout, ...]
    num_pages: int
    kv_dtype: torch.dtype

    def cache(
        self, checkpoint: Checkpoint, options: EngineOptions, share: Share | None, *, dtype: torch.dtype, device: str
    ) -> KVCache:
        """Return a member's cache; without a share the leader's, which takes no memory."""
        config, layout = checkpoint.config, self.layouts[0].without_layers()
        if share is not None:
            config, layout = share.local(config), self.layouts[share.stage]
        return KVCache(
            config,
            num_pages=self.num_pages,
            block_size=options.block_size,
            dtype=self.kv_dtype,
            device=device,
            compute_dtype=dtype,
            model_hash=checkpoint.model_hash,
            layout=layout,
        )


def plan_group(
    checkpoint: Checkpoint,
    partition: Partition,
    options: EngineOptions,
    *,
    dtype: torch.dtype,
    device: str,
    memory_bytes: int,
) -> GroupPlan:
    """Decide a group's shares and pages; `memory_bytes` are those of the member that has least.

    Raises ConfigError where the model cannot be cut so.
    """
    config = checkpoint.config
    kv_dtype = resolve_kv_dtype(options.kv_dtype, compute_dtype=dtype, device=device)
    try:
        shares = shares_of(config, partition)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    layouts = layouts_of(config, layers_of_stages(config.num_layers, partition.num_stages))
    pages = kv_sizing.num_pages(
        shares[0].local(config),
        options,
        dtype_bytes=kv_dtype.itemsize,
        memory_bytes=memory_bytes,
        layout=layouts[0],
    )
    return GroupPlan(partition=partition, shares=shares, layouts=layouts, num_pages=pages, kv_dtype=kv_dtype)


def start_inproc_group(
    checkpoint: Checkpoint,
    plan: GroupPlan,
    *,
    options: EngineOptions,
    num_hosts: int,
    dtype: torch.dtype,
    device: str,
    weights: str,
    resources: ExitStack,
) -> PipelinedModel:
    """Start the members of a group, each with `num_hosts` expert hosts of its own, and return the leader's model."""
    partition = plan.partition
    ranks_of_stages = [thread_ranks(partition.num_ranks, device=device) for _ in plan.layouts]

    def runner_of(stage: int, rank: int) -> StageRunner:
        share = plan.shares[stage * partition.num_ranks + rank]
        dispatcher, _ = start_inproc_hosts(
            checkpoint,
            num_hosts=num_hosts,
            dtype=dtype,
            device=device,
            weights=weights,
            resources=resources,
            worker=f"local-{stage}-{rank}",
            share=share,
        )
        reduction = Reduction(ranks_of_stages[stage][rank]) if partition.num_ranks > 1 else None
        model = load_member(
            checkpoint, share=share, reduction=reduction, dtype=dtype, device=device, weight_format=weights
        )
        cache = plan.cache(checkpoint, options, share, dtype=dtype, device=device)
        return StageRunner(model, cache, dispatcher)

    return start_group(partition, runner_of, resources=resources)
