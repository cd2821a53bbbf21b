"""The passes over single rows between two matrix products: residual and norm, rotation and cache write, routing.

One program computes one row (or one head of it) alone, so a row's bits cannot depend on the others. Semantics and
rounding are those of `model.norm`, `model.rope`, `model.attention` and `model.router`, step by step.
"""

import triton
import triton.language as tl
from torch import Tensor

from llama4_dist.gpu.attention import PagedKeys
from llama4_dist.gpu.tile_loads import wait_for_earlier
from llama4_dist.gpu.tiles import overlap_options

NORM_WARPS = 8


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
    num_tokens, width = x_TD.shape
    add_and_norm_kernel[(num_tokens,)](
        x_TD,
        outputs_ND,
        weight_D,
        normed_TD,
        num_tokens,
        width,
        eps,
        BLOCK_D=triton.next_power_of_2(width),
        ROUTED=num_routed,
        num_warps=NORM_WARPS,
        **overlap_options(),
    )


@triton.jit
def add_and_norm_kernel(
    x,
    outputs,
    weight,
    normed,
    num_tokens,
    width,
    eps,
    BLOCK_D: tl.constexpr,
    ROUTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_earlier(OVERLAP)
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
    scaled = unit * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + token * width + column, scaled.to(dtype), mask=inside)


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    sequences_T: Tensor,
    *,
    experts_per_token: int,
    experts_N: Tensor,
    copies_ND: Tensor,
) -> None:
    """Choose each token's experts; write their numbers to `experts_N` and the token's scored rows to `copies_ND`.

    The T·K copies are followed by T of the shared expert, whose number is that of the last routed one plus 1; their
    rows are left as they are.

    A row is multiplied by the sigmoid of its expert's logit: Llama 4 scales what an expert reads. Equal logits go to
    the lowest expert. A row whose sequence is -1 is padding and gets expert -1.
    """
    num_tokens, width = x_TD.shape
    route_kernel[(num_tokens,)](
        x_TD,
        weight_ED,
        sequences_T,
        experts_N,
        copies_ND,
        num_tokens,
        width,
        weight_ED.shape[0],
        COPIES=experts_per_token,
        EXPERTS=triton.next_power_of_2(weight_ED.shape[0]),
        BLOCK_D=min(512, triton.next_power_of_2(width)),
        num_warps=NORM_WARPS,
        **overlap_options(),
    )


@triton.jit
def route_kernel(
    x,
    weight,
    sequences,
    chosen,
    copies,
    num_tokens,
    width,
    num_experts,
    COPIES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_earlier(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    column = tl.arange(0, BLOCK_D)
    dtype = x.dtype.element_ty
    products = tl.zeros((EXPERTS, BLOCK_D), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        inside = start + column < width
        row = tl.load(x + token * width + start + column, mask=inside, other=0.0).to(tl.float32)
        at = weight + expert[:, None] * width + (start + column)[None, :]
        tile = tl.load(at, mask=(expert < num_experts)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products += tile * row[None, :]
    logits = tl.sum(products, 1).to(dtype).to(tl.float32)
    logits = tl.where(expert < num_experts, logits, float("-inf"))
    tl.store(chosen + num_tokens * COPIES + token, num_experts)
    for copy in tl.static_range(COPIES):
        best = tl.max(logits, 0)
        winner = tl.min(tl.where(logits == best, expert, EXPERTS), 0)
        tl.store(chosen + token * COPIES + copy, tl.where(tl.load(sequences + token) >= 0, winner, -1))
        score = (1.0 / (1.0 + tl.exp(-best))).to(dtype).to(tl.float32)
        for start in range(0, width, BLOCK_D):
            inside = start + column < width
            row = tl.load(x + token * width + start + column, mask=inside, other=0.0).to(tl.float32)
            at = copies + (token * COPIES + copy) * width + start + column
            tl.store(at, (row * score).to(dtype), mask=inside)
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
        **overlap_options(),
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
    OVERLAP: tl.constexpr,
):
    wait_for_earlier(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, HEAD_DIM)
    dtype = qkv.dtype.element_ty
    x = tl.load(qkv + token * ((HEADS + 2 * KV_HEADS) * HEAD_DIM) + head * HEAD_DIM + channel).to(tl.float32)
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
    else:
        sequence = tl.load(sequences + token)
        if sequence >= 0:
            position = tl.load(positions + token)
            page = tl.load(table + sequence * table_stride + position // PAGE - tl.load(first_pages + sequence))
            slot = page.to(tl.int64) * PAGE + position % PAGE
            if head < HEADS + KV_HEADS:
                at = keys + slot * (KV_HEADS * HEAD_DIM) + (head - HEADS) * HEAD_DIM + channel
            else:
                at = values + slot * (KV_HEADS * HEAD_DIM) + (head - HEADS - KV_HEADS) * HEAD_DIM + channel
            tl.store(at, x.to(keys.dtype.element_ty))
