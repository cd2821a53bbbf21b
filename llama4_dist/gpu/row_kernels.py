"""The passes over single rows between two matrix products: residual and norm, rotation and cache write, routing.

One program computes one row (or one head of it) alone, so a row's bits cannot depend on the others. Semantics and
rounding are those of `model.norm`, `model.rope`, `model.attention` and `model.router`, step by step.
"""

import triton
import triton.language as tl
from torch import Tensor

from llama4_dist.gpu.attention import PagedKeys

NORM_WARPS = 8
ROUTER_WARPS = 16
THREADS_PER_WARP = 32
EXPERTS_TOGETHER = 4  # whose weights one row meets at a time


def add_and_norm(
    x_TD: Tensor,
    outputs_ND: Tensor | None,
    weight_D: Tensor,
    normed_TD: Tensor,
    *,
    eps: float,
    num_routed: int = 0,
) -> None:
    """Add a sublayer's outputs to the residual stream `x_TD` in place, and write its weighted norm to `normed_TD`.

    `num_routed` 0: outputs are [T, D], or None: nothing to add. K: outputs are [T·K + T, D], the K routed copies of a
    token side by side, then the shared expert's rows.
    """
    _launch(x_TD, outputs_ND, weight_D, normed_TD, eps=eps, num_routed=num_routed)


def add_norm_and_route(
    x_TD: Tensor,
    outputs_TD: Tensor,
    weight_D: Tensor,
    normed_TD: Tensor,
    router_ED: Tensor,
    sequences_T: Tensor,
    *,
    eps: float,
    experts_per_token: int,
    experts_N: Tensor,
    copies_ND: Tensor,
) -> None:
    """Do what `add_and_norm` does, and choose each token's experts; write their numbers and the token's scored rows.

    A row is multiplied by the sigmoid of its expert's logit: Llama 4 scales what an expert reads. Equal logits go to
    the lowest expert. A row whose sequence is -1 is padding and gets expert -1. The T·K copies are followed by T of the
    shared expert, whose number is that of the last routed one plus 1; their rows are left as they are.
    """
    _launch(
        x_TD,
        outputs_TD,
        weight_D,
        normed_TD,
        eps=eps,
        router_ED=router_ED,
        sequences_T=sequences_T,
        experts_per_token=experts_per_token,
        experts_N=experts_N,
        copies_ND=copies_ND,
    )


def warps_for(block: int, at_most: int) -> int:
    """Return how many warps compute one row of `block` elements, a power of two.

    Never more threads than elements: Triton then has several threads load one element, and of a row that is updated in
    place the second may read what the first has stored. With 512 threads for 64 elements logits on an H200 were wrong.
    """
    return max(1, min(at_most, block // (2 * THREADS_PER_WARP)))


def _launch(
    x_TD: Tensor,
    outputs_ND: Tensor | None,
    weight_D: Tensor,
    normed_TD: Tensor,
    *,
    eps: float,
    num_routed: int = 0,
    router_ED: Tensor | None = None,
    sequences_T: Tensor | None = None,
    experts_per_token: int = 0,
    experts_N: Tensor | None = None,
    copies_ND: Tensor | None = None,
) -> None:
    num_tokens, width = x_TD.shape
    num_experts = 1 if router_ED is None else router_ED.shape[0]
    block = triton.next_power_of_2(width)
    add_and_norm_kernel[(num_tokens,)](
        x_TD,
        outputs_ND,
        weight_D,
        normed_TD,
        router_ED,
        sequences_T,
        experts_N,
        copies_ND,
        num_tokens,
        width,
        num_experts,
        eps,
        BLOCK_D=block,
        ROUTED=num_routed,
        COPIES=experts_per_token,
        EXPERTS=triton.next_power_of_2(num_experts),
        TOGETHER=EXPERTS_TOGETHER,
        num_warps=warps_for(block, NORM_WARPS if router_ED is None else ROUTER_WARPS),
    )


@triton.jit
def add_and_norm_kernel(
    x,
    outputs,
    weight,
    normed,
    router,
    sequences,
    chosen,
    copies,
    num_tokens,
    width,
    num_experts,
    eps,
    BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr,
    COPIES: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    dtype = x.dtype.element_ty
    total = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
    if outputs is not None:
        if ROUTED == 0:
            added = tl.load(outputs + token * width + column, mask=inside, other=0.0).to(tl.float32)
        else:
            added = tl.load(outputs + token * ROUTED * width + column, mask=inside, other=0.0).to(tl.float32)
            for copy in tl.static_range(1, ROUTED):
                at = outputs + (token * ROUTED + copy) * width + column
                added = (added + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
            at = outputs + (num_tokens * ROUTED + token) * width + column
            added = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + added).to(dtype).to(tl.float32)
        total = (total + added).to(dtype)
        tl.store(x + token * width + column, total, mask=inside)
        total = total.to(tl.float32)
    mean_square = tl.sum(total * total, 0) / width
    unit = (total * tl.rsqrt(mean_square + eps)).to(dtype).to(tl.float32)
    row = (unit * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    tl.store(normed + token * width + column, row, mask=inside)
    if router is not None:
        seen = row.to(tl.float32)
        expert = tl.arange(0, EXPERTS)
        logits = tl.full((EXPERTS,), float("-inf"), dtype=tl.float32)
        for first in range(0, num_experts, TOGETHER):
            some = first + tl.arange(0, TOGETHER)
            weights_at = router + some[:, None] * width + column[None, :]
            exists = (some < num_experts)[:, None] & inside[None, :]
            found = tl.sum(tl.load(weights_at, mask=exists, other=0.0).to(tl.float32) * seen[None, :], 1)
            # Each lands in its place: a sum of one number and zeros.
            placed = tl.sum(tl.where(expert[:, None] == some[None, :], found[None, :], 0.0), 1)
            logits = tl.where((expert >= first) & (expert < first + TOGETHER), placed, logits)
        logits = tl.where(expert < num_experts, logits.to(dtype).to(tl.float32), float("-inf"))
        tl.store(chosen + num_tokens * COPIES + token, num_experts)
        for copy in tl.static_range(COPIES):
            best = tl.max(logits, 0)
            winner = tl.min(tl.where(logits == best, expert, EXPERTS), 0)
            tl.store(chosen + token * COPIES + copy, tl.where(tl.load(sequences + token) >= 0, winner, -1))
            score = (1.0 / (1.0 + tl.exp(-best))).to(dtype).to(tl.float32)
            tl.store(copies + (token * COPIES + copy) * width + column, (seen * score).to(dtype), mask=inside)
            logits = tl.where(expert == winner, float("-inf"), logits)


def rotate_and_store(
    qkv_TD: Tensor,
    q_THC: Tensor,
    pages: PagedKeys,
    *,
    positions_T: Tensor,
    sequences_T: Tensor,
    rotation_T2C: Tensor | None,
    temperature_T: Tensor | None,
    has_qk_norm: bool,
    eps: float,
) -> None:
    """Split projected rows into heads: queries, turned and scaled, to `q_THC`; keys and values into the cache.

    `rotation_T2C` holds float32 cosines and sines [T, 2, C/2]. A row whose sequence is -1 is padding: nothing of it is
    stored in the cache.
    """
    num_tokens, num_heads, head_dim = q_THC.shape
    num_kv_heads = pages.keys_SD.shape[1] // head_dim
    rotate_and_store_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
        qkv_TD,
        q_THC,
        pages.keys_SD,
        pages.values_SD,
        positions_T,
        sequences_T,
        pages.table,
        pages.first_pages_B,
        rotation_T2C,
        temperature_T,
        pages.table.stride(0),
        eps,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE=pages.page_size,
        QK_NORM=has_qk_norm,
        num_warps=1,
    )


@triton.jit
def rotate_and_store_kernel(
    qkv,
    queries,
    keys,
    values,
    positions,
    sequences,
    table,
    first_pages,
    rotation,
    temperature,
    table_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, HEAD_DIM)
    dtype = qkv.dtype.element_ty
    # All that has to come from memory is asked for before any of it is needed.
    x = tl.load(qkv + token * ((HEADS + 2 * KV_HEADS) * HEAD_DIM) + head * HEAD_DIM + channel).to(tl.float32)
    sequence = tl.load(sequences + token)
    position = tl.load(positions + token)
    is_stored = (sequence >= 0) & (head >= HEADS)
    first_page = tl.load(first_pages + sequence, mask=is_stored, other=0)
    page = tl.load(table + sequence * table_stride + position // PAGE - first_page, mask=is_stored, other=0)
    slot = page.to(tl.int64) * PAGE + position % PAGE
    if head < HEADS + KV_HEADS:
        if rotation is not None:
            pair = tl.arange(0, HEAD_DIM // 2)
            cosine = tl.load(rotation + token * HEAD_DIM + pair)
            sine = tl.load(rotation + token * HEAD_DIM + HEAD_DIM // 2 + pair)
            even, odd = tl.split(tl.reshape(x, (HEAD_DIM // 2, 2)))
            x = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (HEAD_DIM,))
            x = x.to(dtype).to(tl.float32)
        if QK_NORM:
            x = (x * tl.rsqrt(tl.sum(x * x, 0) / HEAD_DIM + eps)).to(dtype).to(tl.float32)
    if head < HEADS:
        if temperature is not None:
            x = x * tl.load(temperature + token)
        tl.store(queries + (token * HEADS + head) * HEAD_DIM + channel, x.to(dtype))
    elif is_stored:
        if head < HEADS + KV_HEADS:
            at = keys + slot * (KV_HEADS * HEAD_DIM) + (head - HEADS) * HEAD_DIM + channel
        else:
            at = values + slot * (KV_HEADS * HEAD_DIM) + (head - HEADS - KV_HEADS) * HEAD_DIM + channel
        tl.store(at, x.to(keys.dtype.element_ty))
