"""Checks and times the matrix kernels at the shapes of Llama 4 Scout, with several tiles each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gpu_checks.harness import Session, bench, normal, relative_error
from llama4_dist.gpu import grouped_gemm as gemm
from llama4_dist.gpu import stream_linear as stream
from llama4_dist.gpu.stream_linear import RowGroups
from llama4_dist.gpu.tiles import Tile

EXPERTS, WIDTH, EXPERT_WIDTH = 16, 5120, 8192
MAX_ERROR = 4e-3  # of bfloat16 outputs from float32 sums
GATED_TILES = (
    gemm.GATED_TILE,
    replace(gemm.GATED_TILE, num_stages=3),
    replace(gemm.GATED_TILE, programs_per_sm=1),
    replace(gemm.GATED_TILE, programs_per_sm=1, is_flat=True),
    replace(gemm.GATED_TILE, programs_per_sm=1, is_flat=True, num_stages=3),
    replace(gemm.GATED_TILE, use_descriptors=False),
    Tile(block_m=128, block_n=64, block_k=64, num_warps=4, num_stages=3),
    Tile(block_m=256, block_n=64, block_k=64, num_warps=8, num_stages=4),
    Tile(block_m=128, block_n=64, block_k=64, num_warps=4, num_stages=3, programs_per_sm=2, is_flat=True),
)
PLAIN_TILES = (
    gemm.PLAIN_TILE,
    replace(gemm.PLAIN_TILE, num_stages=3),
    replace(gemm.PLAIN_TILE, programs_per_sm=1),
    replace(gemm.PLAIN_TILE, programs_per_sm=1, is_flat=True),
    replace(gemm.PLAIN_TILE, programs_per_sm=1, is_flat=True, num_stages=3),
    Tile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3, programs_per_sm=2, is_flat=True),
    replace(gemm.PLAIN_TILE, use_descriptors=False),
    Tile(block_m=256, block_n=128, block_k=64, num_warps=8, num_stages=4),
    Tile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3),
    Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
)
STREAM_TILES = tuple(
    Tile(block_m=16, block_n=n, block_k=k, num_warps=4, num_stages=s, use_descriptors=d)
    for d in (True, False)
    for n, k, s in ((64, 128, 4), (64, 128, 3), (64, 64, 6), (64, 256, 3), (32, 128, 4), (32, 256, 3), (16, 256, 4))
)


def check_small_products(session: Session) -> None:
    """Both kernels on small odd shapes, every way of loading, against float64."""
    device = session.device
    dtypes = (torch.float32, torch.bfloat16) if session.quick else (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        for described in (True, False):
            for gated in (True, False):
                x_RD = normal(53, 160, device=device, dtype=dtype)
                weights_EFD = normal(3, 80, 160, device=device, dtype=dtype, scale=0.1)
                starts = torch.tensor([0, 17, 17, 53], dtype=torch.int32, device=device)
                order_R = torch.randperm(53, device=device).int()
                tile = Tile(block_m=64, block_n=32, block_k=32, num_warps=4, use_descriptors=described)
                out = gemm.grouped_gemm(x_RD, weights_EFD, starts, gated=gated, order_R=order_R, tile=tile)
                expected = gemm.grouped_gemm_reference(x_RD, weights_EFD, starts, gated=gated, order_R=order_R)
                groups = RowGroups(
                    num_groups=3,
                    max_rows=36,
                    starts=torch.tensor([0, 36, 36, 53], dtype=torch.int32, device=device),
                    experts=torch.tensor([2, 0, 1], dtype=torch.int32, device=device),
                    order_R=order_R,
                )
                tile = Tile(block_m=16, block_n=32, block_k=32, num_warps=4, use_descriptors=described)
                streamed = stream.stream_linear(x_RD, weights_EFD, groups, gated=gated, tile=tile)
                expected_streamed = stream.stream_linear_reference(x_RD, weights_EFD, groups, gated=gated)
                limit = 1e-5 if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 2e-3
                way = f"{str(dtype)[6:]} {'descriptors' if described else 'pointers'}{' gated' if gated else ''}"
                for name, error in (
                    ("grouped", relative_error(out, expected)),
                    ("stream", relative_error(streamed, expected_streamed)),
                ):
                    session.add(f"{name} product, small, {way}", error < limit, error=error)


def check_grouped_gemm(session: Session) -> None:
    """4096 rows over 16 experts of 5120 x 8192: gate and up with SiLU, then down."""
    device, num_rows = session.device, 4096
    counts = torch.full((EXPERTS,), num_rows // EXPERTS)
    uneven = torch.tensor([4, 700, 0, 250, 256, 300, 31, 500, 255, 129, 1, 600, 270, 400, 100, 300])
    weights_EFD = normal(EXPERTS, 2 * EXPERT_WIDTH, WIDTH, device=device, scale=WIDTH**-0.5)
    x_RD = normal(num_rows, WIDTH, device=device)
    operations = 2 * num_rows * 2 * EXPERT_WIDTH * WIDTH
    gated_s = _try_tiles(session, "gate, up and SiLU", GATED_TILES, operations, counts, x_RD, weights_EFD, gated=True)
    _check_uneven(session, "gate, up and SiLU", uneven, x_RD, weights_EFD, gated=True)
    del weights_EFD
    weights_EDF = normal(EXPERTS, WIDTH, EXPERT_WIDTH, device=device, scale=EXPERT_WIDTH**-0.5)
    x_RF = normal(num_rows, EXPERT_WIDTH, device=device)
    plain_s = _try_tiles(session, "down", PLAIN_TILES, operations // 2, counts, x_RF, weights_EDF, gated=False)
    _check_uneven(session, "down", uneven, x_RF, weights_EDF, gated=False)
    rate = 1.5 * operations / (gated_s + plain_s)
    share = rate / session.matrix_rate
    session.add(
        "expert layer of 4096 rows, best tiles",
        share >= 0.75,
        seconds=gated_s + plain_s,
        rate=f"{rate / 1e12:.0f} TFLOP/s",
        share=share,
        note="wanted: 75 %",
    )


def _starts(counts: Tensor, device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device=device, dtype=torch.int32)


def _try_tiles(
    session: Session,
    name: str,
    tiles: Sequence[Tile],
    operations: int,
    counts: Tensor,
    x_RD: Tensor,
    weights_EFD: Tensor,
    *,
    gated: bool,
) -> float:
    starts = _starts(counts, session.device)
    order_R = None if gated else torch.randperm(len(x_RD), device=session.device).int()
    best_s, first_bits = float("inf"), None
    for tile in tiles:
        try:
            out = gemm.grouped_gemm(x_RD, weights_EFD, starts, gated=gated, order_R=order_R, tile=tile)
            call = partial(gemm.grouped_gemm, x_RD, weights_EFD, starts, gated=gated, order_R=order_R, tile=tile)
            seconds = bench([call] * 3)
        except Exception as error:  # noqa: BLE001 - another tile may do
            session.add(f"{name}: {_name(tile)}", "FAIL", note=repr(error)[:100])
            continue
        first_bits = out if first_bits is None else first_bits
        is_same = torch.equal(out, first_bits)
        session.add(
            f"{name}: {_name(tile)}",
            "same bits" if is_same else "other bits",
            seconds=seconds,
            rate=f"{operations / seconds / 1e12:.0f} TFLOP/s",
            share=operations / seconds / session.matrix_rate,
        )
        if seconds < best_s:
            best_s = seconds
            session.best[name] = _name(tile)
    return best_s


def _check_uneven(
    session: Session, name: str, counts: Tensor, x_RD: Tensor, weights_EFD: Tensor, *, gated: bool
) -> None:
    starts = _starts(counts, session.device)
    out = gemm.grouped_gemm(x_RD, weights_EFD, starts, gated=gated)
    error = relative_error(out, gemm.grouped_gemm_reference(x_RD, weights_EFD, starts, gated=gated))
    session.add(f"{name}: uneven experts against float64", error < MAX_ERROR, error=error)


def _name(tile: Tile) -> str:
    loads = "tma" if tile.use_descriptors else "ptr"
    stay = f" stay{tile.programs_per_sm}" if tile.programs_per_sm else ""
    stay += " flat" if tile.is_flat else ""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages} {loads}{stay}"


def check_stream(session: Session) -> None:
    """The four products of a decode layer at one row, each over weights larger than the cache."""
    device = session.device
    gate_up = normal(EXPERTS + 1, 2 * EXPERT_WIDTH, WIDTH, device=device, scale=WIDTH**-0.5)
    down = normal(EXPERTS + 1, WIDTH, EXPERT_WIDTH, device=device, scale=EXPERT_WIDTH**-0.5)
    attention = normal(8, 7168, WIDTH, device=device, scale=WIDTH**-0.5)
    output = normal(8, WIDTH, WIDTH, device=device, scale=WIDTH**-0.5)
    head = normal(1, 202048, WIDTH, device=device, scale=WIDTH**-0.5)
    x_1D, copies_2D, inner_2F = (normal(*s, device=device) for s in ((1, WIDTH), (2, WIDTH), (2, EXPERT_WIDTH)))
    cases: list[tuple[str, Tensor, Tensor, list[list[int]], bool]] = [
        ("qkv", x_1D, attention, [[i] for i in range(8)], False),
        ("o", x_1D, output, [[i] for i in range(8)], False),
        ("gate and up, routed and shared", copies_2D, gate_up, [[i, EXPERTS] for i in range(0, 16, 4)], True),
        ("down, routed and shared", inner_2F, down, [[i, EXPERTS] for i in range(0, 16, 4)], False),
        ("head", x_1D, head, [[0]], False),
    ]
    for name, x_RD, weights_EFD, choices, gated in cases:
        groups = [_single_rows(experts, device) for experts in choices]
        num_bytes = len(choices[0]) * weights_EFD[0].nbytes
        expected = stream.stream_linear_reference(x_RD, weights_EFD, groups[0], gated=gated)
        best_s = float("inf")
        for tile in STREAM_TILES:
            try:
                error = relative_error(
                    stream.stream_linear(x_RD, weights_EFD, groups[0], gated=gated, tile=tile), expected
                )
                seconds = bench(_calls(x_RD, weights_EFD, groups, gated, tile))
            except Exception as failure:  # noqa: BLE001 - another tile may do
                session.add(f"stream {name}: {_name(tile)}", "FAIL", note=repr(failure)[:100])
                continue
            rate = num_bytes / seconds
            session.add(
                f"stream {name}: {_name(tile)}",
                error < MAX_ERROR,
                error=error,
                seconds=seconds,
                rate=f"{rate / 1e12:.2f} TB/s",
                share=rate / session.copy_rate,
            )
            if seconds < best_s:
                best_s = seconds
                session.best[f"stream {name}"] = _name(tile)


def _single_rows(experts: Sequence[int], device: torch.device) -> RowGroups:
    return RowGroups(
        num_groups=len(experts),
        max_rows=1,
        starts=torch.arange(len(experts) + 1, dtype=torch.int32, device=device),
        experts=torch.tensor(experts, dtype=torch.int32, device=device),
        order_R=None,
    )


def _calls(
    x_RD: Tensor, weights_EFD: Tensor, groups: Sequence[RowGroups], gated: bool, tile: Tile
) -> list[Callable[[], Tensor]]:
    return [partial(stream.stream_linear, x_RD, weights_EFD, group, gated=gated, tile=tile) for group in groups]


def check_same_bits(session: Session) -> None:
    """A row's bits: alone, among others, and in the kernel for few rows as in the one for many."""
    if not session.is_cuda:
        return  # numpy chooses its products by their shape, so the interpreter says nothing of bits
    device, width, num_columns = session.device, WIDTH, 2048
    for dtype in (torch.bfloat16, torch.float16):
        for gated in (False, True):
            weights_EFD = normal(1, num_columns, width, device=device, dtype=dtype, scale=width**-0.5)
            x_RD = normal(70, width, device=device, dtype=dtype)
            many = gemm.grouped_gemm(x_RD, weights_EFD, RowGroups.dense(70, device).starts, gated=gated)
            name = f"{str(dtype)[6:]}{' gated' if gated else ''}"
            for num_rows in (1, 16, 33, 64):
                few = stream.stream_linear(x_RD[:num_rows], weights_EFD, RowGroups.dense(num_rows, device), gated=gated)
                same = torch.equal(few, many[:num_rows])
                session.add(f"same bits, {num_rows} of 70 rows, {name}", same, note=_difference(few, many[:num_rows]))
            for block_n in (32, 16):
                tile = replace(stream.STREAM_TILE, block_n=block_n)
                few = stream.stream_linear(x_RD[:16], weights_EFD, RowGroups.dense(16, device), gated=gated, tile=tile)
                verdict = "same bits" if torch.equal(few, many[:16]) else "other bits"
                session.add(f"mma.sync tile of {block_n} columns, {name}", verdict, note=_difference(few, many[:16]))


def _difference(a: Tensor, b: Tensor) -> str:
    return "" if torch.equal(a, b) else f"{(a != b).float().mean():.2%} differ, by {(a - b).abs().max():.1e}"
