"""The kernels of attention: decode and prefill by one device function, so that both give a query the same bits.

A query's keys start at a fixed place (its sequence's or its chunk's first position) and are cut into splits of `SPLIT`
keys. Inside a split softmax runs online over tiles of keys; splits are merged in ascending order. Decode computes
splits side by side and merges them in a second launch, prefill one after the other: the same numbers, in the same
order. A tile of keys that a query may not see changes nothing: its weights are exactly 0.
Sources: FlashAttention-2 (arXiv 2307.08691), Flash-Decoding (Dao et al. 2023), paging as in vLLM (arXiv 2309.06180).
"""

import triton
import triton.language as tl

from llama4_dist.gpu.tile_loads import add_product


@triton.jit
def exponential_of_difference(a, b):
    """2^(a − b), where a ≤ b; 0 if a is −inf, also when b is."""
    return tl.exp2(a - tl.where(b == float("-inf"), 0.0, b))


@triton.jit
def attend_tile(
    q_tile,
    keys,
    values,
    table_row,
    first_page,
    first_key,
    start,
    key_stop,
    num_keys,
    kv_head,
    scale,
    best,
    total,
    mixed,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on with the largest logit, the sum of weights and the weighted values over keys [start, start + BLOCK_S)."""
    channel = tl.arange(0, HEAD_DIM)
    key = start + tl.arange(0, BLOCK_S)
    exists = key < key_stop
    position = first_key + key
    page = tl.load(table_row + position // PAGE - first_page, mask=exists, other=0)
    slot = page.to(tl.int64) * PAGE + position % PAGE
    at = slot[:, None] * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + channel[None, :]
    k_tile = tl.load(keys + at, mask=exists[:, None], other=0.0).to(q_tile.dtype)
    v_tile = tl.load(values + at, mask=exists[:, None], other=0.0).to(q_tile.dtype)
    logits = add_product(q_tile, k_tile.T, tl.zeros((BLOCK_M, BLOCK_S), dtype=tl.float32), PRECISION, 0)
    logits = tl.where(key[None, :] < num_keys[:, None], logits, float("-inf"))
    new_best = tl.maximum(best, tl.max(logits, 1) * scale)
    shrink = exponential_of_difference(best, new_best)
    shift = tl.where(new_best == float("-inf"), 0.0, -new_best)
    weights = tl.exp2(
        tl.fma(logits, tl.full(logits.shape, scale, tl.float32), tl.broadcast_to(shift[:, None], logits.shape))
    )
    total = total * shrink + tl.sum(weights, 1)
    mixed = add_product(weights.to(v_tile.dtype), v_tile, mixed * shrink[:, None], PRECISION, 0)
    return new_best, total, mixed


@triton.jit
def attend_kernel(
    queries,
    keys,
    values,
    table,
    first_pages,
    items,
    out,
    partial,
    table_stride,
    max_splits,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most keys: they start first
    kv_head = tl.program_id(1)
    first_row = tl.load(items + item * FIELDS)
    first_position = tl.load(items + item * FIELDS + 1)
    num_queries = tl.load(items + item * FIELDS + 2)
    first_key = tl.load(items + item * FIELDS + 3)
    sequence = tl.load(items + item * FIELDS + 4)
    SHARING: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, BLOCK_M)
    query = row // SHARING
    head = kv_head * SHARING + row % SHARING
    is_live = query < num_queries
    channel = tl.arange(0, HEAD_DIM)
    at = ((first_row + query).to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + channel[None, :]
    q_tile = tl.load(queries + at, mask=is_live[:, None], other=0.0)
    num_keys = tl.where(is_live, first_position + query - first_key + 1, 0)
    most_keys = first_position + num_queries - first_key
    table_row = table + sequence.to(tl.int64) * table_stride
    first_page = tl.load(first_pages + sequence)
    best_of_split = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total_of_split = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed_of_split = tl.zeros((BLOCK_M, HEAD_DIM), dtype=tl.float32)
    first = 0  # of the keys that this program sees
    stop = most_keys
    if partial is not None:
        split = tl.program_id(2)
        if split * SPLIT >= most_keys:
            return
        first = split * SPLIT
        stop = min(most_keys, (split + 1) * SPLIT)
    best = best_of_split
    total = total_of_split
    mixed = mixed_of_split
    for start in range(first, stop, BLOCK_S):
        best_of_split, total_of_split, mixed_of_split = attend_tile(
            q_tile,
            keys,
            values,
            table_row,
            first_page,
            first_key,
            start,
            most_keys,
            num_keys,
            kv_head,
            scale,
            best_of_split,
            total_of_split,
            mixed_of_split,
            KV_HEADS,
            HEAD_DIM,
            PAGE,
            BLOCK_M,
            BLOCK_S,
            PRECISION,
        )
        if partial is None:  # noqa: SIM102 - this is known when compiled, what follows is not
            # A split ends here; in one loop with its tiles, so that the next one's keys are already on their way.
            if ((start + BLOCK_S) % SPLIT == 0) | (start + BLOCK_S >= most_keys):
                new_best = tl.maximum(best, best_of_split)
                old = exponential_of_difference(best, new_best)
                new = exponential_of_difference(best_of_split, new_best)
                total = total * old + total_of_split * new
                mixed = mixed * old[:, None] + mixed_of_split * new[:, None]
                best = new_best
                best_of_split = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
                total_of_split = tl.zeros((BLOCK_M,), dtype=tl.float32)
                mixed_of_split = tl.zeros((BLOCK_M, HEAD_DIM), dtype=tl.float32)
    if partial is None:
        mixed = mixed / tl.where(is_live, total, 1.0)[:, None]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=is_live[:, None])
    else:
        slot = ((item * max_splits + split) * HEADS + head).to(tl.int64) * (HEAD_DIM + 2)
        tl.store(partial + slot[:, None] + channel[None, :], mixed_of_split, mask=is_live[:, None])
        tl.store(partial + slot + HEAD_DIM, best_of_split, mask=is_live)
        tl.store(partial + slot + HEAD_DIM + 1, total_of_split, mask=is_live)


@triton.jit
def merge_splits_kernel(
    partial,
    items,
    out,
    max_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLIT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    item = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(items + item * FIELDS).to(tl.int64)
    num_keys = tl.load(items + item * FIELDS + 1) - tl.load(items + item * FIELDS + 3) + 1
    num_keys = tl.where(tl.load(items + item * FIELDS + 2) > 0, num_keys, 0)
    num_splits = tl.cdiv(num_keys, SPLIT)
    channel = tl.arange(0, HEAD_DIM)
    best = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    mixed = tl.zeros((HEAD_DIM,), dtype=tl.float32)
    first_split = partial + (item.to(tl.int64) * max_splits * HEADS + head) * (HEAD_DIM + 2)
    for start in range(0, num_splits, AT_ONCE):
        for offset in tl.static_range(AT_ONCE):  # their loads are under way together
            exists = tl.arange(0, 1) + (start + offset) < num_splits
            at = first_split + (start + offset) * (HEADS * (HEAD_DIM + 2))
            mixed_of_split = tl.load(at + channel, mask=exists, other=0.0)
            best_of_split = tl.load(at + HEAD_DIM + tl.arange(0, 1), mask=exists, other=float("-inf"))
            total_of_split = tl.load(at + HEAD_DIM + 1 + tl.arange(0, 1), mask=exists, other=0.0)
            new_best = tl.maximum(best, best_of_split)
            old = exponential_of_difference(best, new_best)
            new = exponential_of_difference(best_of_split, new_best)
            total = total * old + total_of_split * new
            mixed = mixed * old + mixed_of_split * new
            best = new_best
    if num_keys > 0:
        tl.store(out + (row * HEADS + head) * HEAD_DIM + channel, (mixed / total).to(out.dtype.element_ty))
