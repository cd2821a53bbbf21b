"""How the kernels find a layer's keys and values: the one place that knows how `KVCache` is laid out."""

from collections.abc import Sequence

from torch import Tensor

from llama4_dist.model.batch import SequenceSpan
from llama4_dist.model.kv_cache import KVCache


def layer_slots(cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values, each [slots, G·C]."""
    keys_SD, values_SD = cache._slots[layer]
    return keys_SD, values_SD


def num_groups(cache: KVCache) -> int:
    """Return how many page tables a sequence has."""
    return 1


def group_of(cache: KVCache, layer: int) -> int:
    """Return which of a sequence's page tables a layer uses."""
    return 0


def page_runs(span: SequenceSpan) -> Sequence[tuple[int, Sequence[int]]]:
    """Return per group the number of its first page, counted from the sequence's start, and the pages' ids."""
    return ((0, span.blocks),)
