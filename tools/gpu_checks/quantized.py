"""Checks float8 and four-bit experts: the kernels against float64 of the same numbers, and the formats' own error."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gpu_checks.harness import Session, bench, normal, relative_error
from gpu_checks.products import EXPERT_WIDTH, EXPERTS, WIDTH
from llama4_dist.gpu import grouped_gemm as gemm
from llama4_dist.gpu import int4_linear as int4
from llama4_dist.gpu import stream_linear as stream
from llama4_dist.gpu.packed import Packed
from llama4_dist.gpu.quantize import FLOAT8, from_float8, from_int4, quantize_rows, quantize_rows_reference
from llama4_dist.gpu.routing import SortedRows
from llama4_dist.gpu.stream_linear import RowGroups
from llama4_dist.gpu.tiles import Tile

MAX_KERNEL_ERROR = 5e-3  # against the same rounded numbers: what bfloat16 outputs leave
MAX_FLOAT8_ERROR, MAX_INT4_ERROR = 0.06, 0.2  # against the numbers before rounding, normally distributed


def check_quantized(session: Session) -> None:
    device, width, inner = session.device, 256, 128
    x_RD = normal(40, width, device=device)
    truncating = 1 if session.is_cuda else 2  # the interpreter's casts round toward zero
    _check_rows(session, x_RD)
    starts = torch.tensor([0, 7, 7, 40], dtype=torch.int32, device=device)
    order_R = torch.randperm(40, device=device).int()
    groups = RowGroups(
        num_groups=3,
        max_rows=33,
        starts=starts,
        experts=torch.tensor([2, 1, 0], dtype=torch.int32, device=device),
        order_R=order_R,
    )
    rows = SortedRows(order_R=order_R, starts=starts)
    for gated in (False, True):
        weights_EFD = normal(3, inner, width, device=device, scale=width**-0.5)
        plain = "gated" if gated else "plain"
        back = None if gated else order_R
        for form, limit in (("float8", MAX_FLOAT8_ERROR), ("int4", MAX_INT4_ERROR)):
            packed = Packed(values_EFD=weights_EFD).quantized(form)
            rounded_EFD, x_rounded_RD = _meaning(packed, x_RD)
            few = packed.multiply(x_RD, groups, gated=gated)
            error = relative_error(few, stream.stream_linear_reference(x_rounded_RD, rounded_EFD, groups, gated=gated))
            session.add(f"{form}, few rows, {plain}", error < MAX_KERNEL_ERROR, error=error)
            many = packed.multiply(x_RD, rows, gated=gated)
            expected = gemm.grouped_gemm_reference(x_rounded_RD, rounded_EFD, starts, gated=gated, order_R=back)
            error = relative_error(many, expected)
            session.add(f"{form}, many rows, {plain}", error < MAX_KERNEL_ERROR, error=error)
            exact = gemm.grouped_gemm_reference(x_RD, weights_EFD, starts, gated=gated, order_R=back)
            error = relative_error(many, exact)
            session.add(f"{form}, against unrounded weights, {plain}", error < truncating * limit, error=error)


def _check_rows(session: Session, x_RD: Tensor) -> None:
    values_RD, scales_R = quantize_rows(x_RD)
    expected_RD, expected_R = quantize_rows_reference(x_RD)
    error = relative_error(from_float8(values_RD, scales_R), x_RD)
    is_same = torch.equal(scales_R, expected_R) and torch.equal(values_RD.float(), expected_RD.float())
    session.add("rows to float8", error < (0.04 if session.is_cuda else 0.08), error=error)
    if session.is_cuda:
        session.add("rows to float8: as torch rounds", is_same)


def _meaning(packed: Packed, x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights and rows that the kernels really multiply."""
    assert packed.scales is not None
    if packed.values_EFD.dtype == FLOAT8:
        return from_float8(packed.values_EFD, packed.scales), from_float8(*quantize_rows(x_RD))
    return from_int4(packed.values_EFD, packed.scales), x_RD


def check_quantized_bits(session: Session) -> None:
    """A row's bits do not depend on how many go with it, nor on the kernel."""
    if not session.is_cuda:
        return  # numpy chooses its products by their shape
    weights_EFD = normal(1, 2048, WIDTH, device=session.device, scale=WIDTH**-0.5)
    x_RD = normal(70, WIDTH, device=session.device)
    for form in ("float8", "int4"):
        packed = Packed(values_EFD=weights_EFD).quantized(form)
        for gated in (False, True):
            starts = RowGroups.dense(70, session.device).starts
            many = packed.multiply(x_RD, SortedRows(order_R=None, starts=starts), gated=gated)
            for num_rows in (1, 17, 64):
                few = packed.multiply(x_RD[:num_rows], RowGroups.dense(num_rows, session.device), gated=gated)
                same = torch.equal(few, many[:num_rows])
                note = "" if same else f"{float((few != many[:num_rows]).float().mean()):.2%} differ"
                session.add(f"same bits, {form}, {num_rows} of 70 rows{' gated' if gated else ''}", same, note=note)


def time_quantized(session: Session) -> None:
    """The expert layer in both formats: one row, weights streamed; 4096 rows over 16 experts."""
    for form in ("float8", "int4"):
        for name, num_out, num_in, gated in (
            ("gate and up", 2 * EXPERT_WIDTH, WIDTH, True),
            ("down", WIDTH, EXPERT_WIDTH, False),
        ):
            stored = Packed(values_EFD=normal(EXPERTS + 1, num_out, num_in, device=session.device, scale=num_in**-0.5))
            packed = stored.quantized(form)
            del stored
            _time_few(session, f"{form} {name}, one row", packed, num_in, gated)
            _time_many(session, f"{form} {name}, 4096 rows", packed, num_in, gated)


def _time_few(session: Session, name: str, packed: Packed, width: int, gated: bool) -> None:
    x_RD = normal(2, width, device=session.device)
    assert packed.scales is not None
    num_bytes = 2 * (packed.values_EFD[0].nbytes + packed.scales[0].nbytes)
    pairs = [
        RowGroups(
            num_groups=2,
            max_rows=1,
            starts=torch.arange(3, dtype=torch.int32, device=session.device),
            experts=torch.tensor([expert, EXPERTS], dtype=torch.int32, device=session.device),
            order_R=None,
        )
        for expert in range(0, EXPERTS, 2)
    ]
    for tile, call in _few_calls(packed, x_RD, gated):
        try:
            seconds = bench([partial(call, pair) for pair in pairs])
        except Exception as error:  # noqa: BLE001 - another tile may do
            session.add(f"{name}: {tile}", "FAIL", note=repr(error)[:100])
            continue
        rate = num_bytes / seconds
        session.add(
            f"{name}: {tile}",
            "measured",
            seconds=seconds,
            rate=f"{rate / 1e12:.2f} TB/s",
            share=rate / session.copy_rate,
        )


def _few_calls(packed: Packed, x_RD: Tensor, gated: bool) -> list[tuple[str, Callable[[RowGroups], Tensor]]]:
    calls: list[tuple[str, Callable[[RowGroups], Tensor]]] = []
    values, scales = packed.values_EFD, packed.scales
    assert scales is not None
    if values.dtype == FLOAT8:
        x8_RD, x_scale_R = quantize_rows(x_RD)
        for block_k, stages in ((256, 3), (256, 4), (128, 4), (128, 6), (512, 2)):
            tile = Tile(block_m=16, block_n=64, block_k=block_k, num_warps=4, num_stages=stages)
            calls.append(
                (
                    f"64x{block_k} s{stages}",
                    partial(
                        stream.stream_linear,
                        x8_RD,
                        values,
                        gated=gated,
                        x_scale_R=x_scale_R,
                        scales_EF=scales,
                        out_dtype=torch.bfloat16,
                        tile=tile,
                    ),
                )
            )
        calls.append(("with rounding of rows", lambda pair: packed.multiply(x_RD, pair, gated=gated)))
        return calls
    for block_n, block_k, warps, stages in ((64, 256, 4, 3), (64, 512, 4, 3), (64, 128, 4, 6), (32, 256, 4, 4)):
        tile = replace(int4.INT4_TILE, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages)
        calls.append(
            (
                f"{block_n}x{block_k} w{warps} s{stages}",
                partial(int4.int4_linear, x_RD, values, scales, gated=gated, tile=tile),
            )
        )
    return calls


def _time_many(session: Session, name: str, packed: Packed, width: int, gated: bool) -> None:
    x_RD = normal(4096, width, device=session.device)
    starts = torch.arange(0, 4096 + 1, 4096 // EXPERTS, dtype=torch.int32, device=session.device)
    rows = SortedRows(order_R=None, starts=torch.cat([starts, starts[-1:]]))
    seconds = bench([lambda: packed.multiply(x_RD, rows, gated=gated)])
    operations = 2 * 4096 * packed.values_EFD.shape[1] * width
    session.add(
        name,
        "measured",
        seconds=seconds,
        rate=f"{operations / seconds / 1e12:.0f} TFLOP/s",
        share=operations / seconds / session.matrix_rate,
        note="share of bfloat16's rate",
    )
