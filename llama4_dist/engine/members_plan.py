"""What the leader and the members of an attention group must know alike: who holds what, and how keys are paged.

Every process computes it from the checkpoint, the cut and the number of pages; nothing of it needs to be sent.
"""

from dataclasses import dataclass

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine import kv_sizing
from llama4_dist.engine.kv_dtype import resolve_kv_dtype
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import KVLayout, layouts_of
from llama4_dist.partition import Partition, Share, layers_of_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class MembersPlan:
    """`layouts` are those of the stages, which number pages alike; each of `num_pages` has a place in every member.

    Members compute in `dtype` and store keys and values in `kv_dtype`.
    """

    partition: Partition
    shares: tuple[Share, ...]  # in the order of `partition.places`
    layouts: tuple[KVLayout, ...]
    num_pages: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype

    def share(self, stage: int, rank: int) -> Share:
        """Return a member's share."""
        return self.shares[stage * self.partition.num_ranks + rank]

    def cache(self, checkpoint: Checkpoint, share: Share | None, *, device: str) -> KVCache:
        """Return a member's cache; without a share the leader's, which takes no memory."""
        config, layout = checkpoint.config, self.layouts[0].without_layers()
        if share is not None:
            config, layout = share.local(config), self.layouts[share.stage]
        return KVCache(
            config,
            num_pages=self.num_pages,
            block_size=self.block_size,
            dtype=self.kv_dtype,
            device=device,
            compute_dtype=self.dtype,
            model_hash=checkpoint.model_hash,
            layout=layout,
        )


def plan_members(
    checkpoint: Checkpoint,
    partition: Partition,
    options: EngineOptions,
    *,
    dtype: torch.dtype,
    device: str,
    memory_bytes: int,
) -> MembersPlan:
    """Decide a group's shares and pages; `memory_bytes` are those of the member that has least.

    Who was told the number of pages passes it as `options.num_blocks`. Raises ConfigError where the model cannot be cut
    so, and where no page fits.
    """
    config = checkpoint.config
    kv_dtype = resolve_kv_dtype(options.kv_dtype, compute_dtype=dtype, device=device)
    try:
        shares = checkpoint.shares_of(partition)
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
    return MembersPlan(
        partition=partition,
        shares=shares,
        layouts=layouts,
        num_pages=pages,
        block_size=options.block_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
