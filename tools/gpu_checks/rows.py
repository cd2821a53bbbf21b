"""Checks the kernels between the matrix products: norm, routing, rotation, sorting by expert."""

import torch

from gpu_checks.harness import Session, normal, relative_error
from llama4_dist.gpu.attention import PagedKeys
from llama4_dist.gpu.routing import group_rows, group_rows_reference, sort_rows
from llama4_dist.gpu.row_kernels import add_and_norm, add_norm_and_route, rotate_and_store

EPS = 1e-5


def check_rows(session: Session) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _check_norm(session, dtype)
        _check_route(session, dtype)
        _check_rotation(session, dtype)
    _check_sorting(session)


def _limit(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2


def _check_norm(session: Session, dtype: torch.dtype) -> None:
    width = 320 if session.quick else 5120
    for num_routed in (0, 1, 2):
        x_TD = normal(5, width, device=session.device, dtype=dtype)
        num_rows = 5 if num_routed == 0 else 5 * (num_routed + 1)
        outputs_ND = normal(num_rows, width, device=session.device, dtype=dtype)
        weight_D = normal(width, device=session.device, dtype=dtype)
        added = outputs_ND.double()
        if num_routed:
            added = added[: 5 * num_routed].view(5, num_routed, width).sum(1) + added[5 * num_routed :]
        expected_TD = x_TD.double() + added
        normed_TD = torch.full_like(x_TD, float("nan"))
        add_and_norm(x_TD, outputs_ND, weight_D, normed_TD, eps=EPS, num_routed=num_routed)
        scaled = expected_TD * (expected_TD.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight_D.double()
        error = max(relative_error(x_TD, expected_TD), relative_error(normed_TD, scaled))
        session.add(f"add and norm, {num_routed} copies, {str(dtype)[6:]}", error < _limit(dtype), error=error)


def _check_route(session: Session, dtype: torch.dtype) -> None:
    device, width, num_experts = session.device, 320 if session.quick else 5120, 16
    for copies in (1, 2):
        stream_TD, added_TD = (normal(6, width, device=device, dtype=dtype) for _ in range(2))
        x_TD, norm_D = torch.full_like(stream_TD, float("nan")), normal(width, device=device, dtype=dtype)
        weight_ED = normal(num_experts, width, device=device, dtype=dtype, scale=width**-0.5)
        sequences_T = torch.tensor([0, 0, 1, 2, 3, -1], dtype=torch.int32, device=device)
        experts_N = torch.full((6 * copies + 6,), 99, dtype=torch.int32, device=device)
        copies_ND = torch.full((6 * copies, width), float("nan"), dtype=dtype, device=device)
        add_norm_and_route(
            stream_TD,
            added_TD,
            norm_D,
            x_TD,
            weight_ED,
            sequences_T,
            eps=EPS,
            experts_per_token=copies,
            experts_N=experts_N,
            copies_ND=copies_ND,
        )
        logits_TE = x_TD.double() @ weight_ED.double().T
        top_TK, chosen_TK = logits_TE.topk(copies)
        expected = (x_TD.double()[:, None] * top_TK.sigmoid()[..., None]).flatten(0, 1)
        error = relative_error(copies_ND, expected)
        margins = logits_TE.sort(descending=True).values.diff().abs()[:, :copies].min(-1).values[:5]
        agrees = experts_N[: 6 * copies].view(6, copies)[:5].long() == chosen_TK[:5]
        is_right = bool((agrees.all(-1) | (margins < 0.05)).all()) and bool((experts_N[5 * copies : -6] == -1).all())
        is_right &= bool((experts_N[-6:] == num_experts).all())
        session.add(f"route to {copies}, {str(dtype)[6:]}", is_right and error < _limit(dtype), error=error)


def _check_rotation(session: Session, dtype: torch.dtype) -> None:
    device, num_heads, num_kv_heads, head_dim, page_size = session.device, 10, 2, 32, 16
    num_tokens = 4
    qkv_TD = normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device, dtype=dtype)
    positions_T = torch.tensor([17, 18, 40, 3], dtype=torch.int32, device=device)
    sequences_T = torch.tensor([0, 0, 1, -1], dtype=torch.int32, device=device)
    keys_SD, values_SD = normal(2, 160, num_kv_heads * head_dim, device=device, dtype=dtype)
    before_SD = keys_SD.clone()
    pages = PagedKeys(
        keys_SD=keys_SD,
        values_SD=values_SD,
        table=torch.tensor([[4, 7, 2], [9, 5, 1]], dtype=torch.int32, device=device),
        first_pages_B=torch.tensor([0, 1], dtype=torch.int32, device=device),
        page_size=page_size,
    )
    slots = [7 * 16 + 1, 7 * 16 + 2, 5 * 16 + 8]
    angles_TC = positions_T.float()[:, None] * torch.rand(head_dim // 2, device=device)
    q_THC = torch.full((num_tokens, num_heads, head_dim), float("nan"), dtype=dtype, device=device)
    rotate_and_store(
        qkv_TD,
        q_THC,
        pages,
        positions_T=positions_T,
        sequences_T=sequences_T,
        rotation_T2C=torch.stack((angles_TC.cos(), angles_TC.sin()), dim=1),
        temperature_T=torch.tensor([1.0, 1.5, 2.0, 3.0], device=device),
        has_qk_norm=True,
        eps=EPS,
    )
    heads = qkv_TD.double().view(num_tokens, -1, head_dim)
    turn = torch.polar(torch.ones_like(angles_TC), angles_TC).to(torch.complex128)[:, None]
    pairs = torch.view_as_complex(heads[:, : num_heads + num_kv_heads].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    turned = turned * (turned.square().mean(-1, keepdim=True) + EPS).rsqrt()
    scale = torch.tensor([1.0, 1.5, 2.0, 3.0], device=device, dtype=torch.float64)[:, None, None]
    error = max(
        relative_error(q_THC, turned[:, :num_heads] * scale),
        relative_error(keys_SD[slots], turned[:3, num_heads:].flatten(1)),
        relative_error(values_SD[slots], heads[:3, num_heads + num_kv_heads :].flatten(1)),
    )
    others = torch.ones(160, dtype=torch.bool)
    others[slots] = False
    is_untouched = torch.equal(keys_SD[others], before_SD[others])
    session.add(f"rotate, norm, store, {str(dtype)[6:]}", error < _limit(dtype) and is_untouched, error=error)


def _check_sorting(session: Session) -> None:
    generator = torch.Generator().manual_seed(3)
    for num_copies, num_experts in ((1, 4), (2, 17), (9, 5), (64, 17), (128, 129)):
        experts_N = torch.randint(-1, num_experts + 1, (num_copies,), generator=generator).int().to(session.device)
        groups = group_rows(experts_N, num_experts, max_groups=min(num_experts, num_copies), max_rows=16)
        order, starts, experts = group_rows_reference(experts_N, num_experts)
        assert groups.order_R is not None
        is_right = (
            groups.order_R[: len(order)].tolist() == order
            and groups.starts.tolist() == starts + [len(order)] * (groups.num_groups - len(experts))
            and groups.experts[: len(experts)].tolist() == experts
        )
        known_N = experts_N.clamp(0, num_experts - 1)
        rows = sort_rows(known_N, num_experts)
        counts = torch.bincount(known_N.long().cpu(), minlength=num_experts)
        is_right &= rows.starts.diff().tolist() == counts.tolist()
        session.add(f"sort {num_copies} rows by {num_experts} experts", is_right)
