"""Every vector width gives the same bits: workers and hosts of one cluster may have different processors."""

from collections.abc import Callable
from ctypes import byref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights
from llama4_dist.checkpoint.quantising.rounding import quantise_linear
from llama4_dist.checkpoint.scheme import Number, Scheme
from llama4_dist.model.cpu.feed_forward import network_of, packed_network, quantised_network, run_networks
from llama4_dist.model.cpu.panels import NAME_OF, pack
from llama4_dist.model.cpu.quantise import QuantisationError, quantise
from llama4_dist.model.cpu.quantised import stored_network
from llama4_dist.native.bindings import AttentionLayer, AttentionStep, Cache, Router, passes
from tests.native.compiler import needs_compiler
from tests.native.narrow import AVX2, BUILDS, computing_with, narrow_passes

pytestmark = needs_compiler

SHAPES = [(1, 1), (37, 20), (300, 131), (257, 300)]  # a last strip of every kind of rest
NUMS_ROWS = [1, 2, 3, 4, 5, 6, 7, 13, 70]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ON_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)
THREADS = 2


def test_builds_differ_in_their_vectors() -> None:
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no wide vectors to leave out")
    widest = passes()
    assert widest is not None
    assert widest.l4d_strip() > narrow_passes(AVX2).l4d_strip()


@BUILDS
@DTYPES
@ON_SHAPES
def test_a_product_is_the_same(shape: tuple[int, int], dtype: torch.dtype, flags: tuple[str, ...]) -> None:
    weight_FD, x_TD = random(*shape).T.to(dtype), random(70, shape[0])
    assert_equal(flags, lambda _: [pack(weight_FD)(x_TD[:rows]) for rows in NUMS_ROWS])
    assert_equal(flags, lambda _: [quantise(weight_FD.T, QuantisationError())(x_TD[:rows]) for rows in NUMS_ROWS])


@BUILDS
@DTYPES
@ON_SHAPES
def test_a_network_is_the_same(shape: tuple[int, int], dtype: torch.dtype, flags: tuple[str, ...]) -> None:
    width, hidden = shape
    gate_DF, up_DF, down_FD = (random(*part).to(dtype) for part in ((width, hidden), (width, hidden), (hidden, width)))
    weights = ExpertWeights(gate_DF=gate_DF, up_DF=up_DF, down_FD=down_FD)
    x_RD = random(70, width).to(dtype)

    def outputs(_: Any) -> list[Tensor]:
        packed = packed_network(*[pack(part.T) for part in (gate_DF, up_DF, down_FD)])
        outs = []
        for network in (network_of(weights), packed, quantised_network(weights, QuantisationError())):
            for rows in NUMS_ROWS:
                outs.append(torch.empty(rows, width, dtype=dtype))
                run_networks([network], [rows], x_RD[:rows], outs[-1])
        return outs

    assert_equal(flags, outputs)


@BUILDS
@DTYPES
@ON_SHAPES
def test_a_float8_network_is_the_same(shape: tuple[int, int], dtype: torch.dtype, flags: tuple[str, ...]) -> None:
    width, hidden = shape
    scheme = Scheme(number=Number.FLOAT8)
    parts = [quantise_linear(random(*part), scheme, torch.float32)[0] for part in ((hidden, width),) * 2]
    down_DF, _ = quantise_linear(random(width, hidden), scheme, torch.float32)
    weights = QuantisedExpertWeights(gate_FD=parts[0], up_FD=parts[1], down_DF=down_DF)
    x_RD = random(70, width).to(dtype)

    def outputs(_: Any) -> list[Tensor]:
        network, outs = stored_network(weights), []
        for rows in NUMS_ROWS:
            outs.append(torch.empty(rows, width, dtype=dtype))
            run_networks([network], [rows], x_RD[:rows], outs[-1])
        return outs

    assert_equal(flags, outputs)


@BUILDS
@DTYPES
def test_norm_router_and_scan_are_the_same(dtype: torch.dtype, flags: tuple[str, ...]) -> None:
    width, num_experts, num_tokens, count = 301, 19, 13, 3
    weight_ED, norm_D, x_TD = random(num_experts, width).to(dtype), random(width), random(num_tokens, width)

    def routed(native: Any) -> list[Tensor]:
        packed = pack(weight_ED)
        router = Router(width, num_experts, count, 1e-5, norm_D.data_ptr(), packed.address)
        normed_TD, scores_TK = torch.empty(num_tokens, width), torch.empty(num_tokens, count)
        experts_TK, best_T = (
            torch.empty(num_tokens, count, dtype=torch.int64),
            torch.empty(num_tokens, dtype=torch.int64),
        )
        outs = [normed_TD, experts_TK, scores_TK]
        route = getattr(native, f"l4d_route_{NAME_OF[dtype]}")
        route(byref(router), x_TD.data_ptr(), num_tokens, *[out.data_ptr() for out in outs], THREADS)
        finite_T = torch.empty(num_tokens, dtype=torch.bool)
        native.l4d_scan_logits(
            normed_TD.data_ptr(), width, num_tokens, width, best_T.data_ptr(), finite_T.data_ptr(), THREADS
        )
        return [*outs, best_T, finite_T]

    assert_equal(flags, routed)


@BUILDS
@DTYPES
@pytest.mark.parametrize("page_size", [5, 16])
@pytest.mark.parametrize("num_heads", [2, 4, 10, 14])  # for two key/value heads
def test_attention_is_the_same(num_heads: int, page_size: int, dtype: torch.dtype, flags: tuple[str, ...]) -> None:
    width, num_kv_heads, head_dim, first_key, num_keys, num_tokens = 40, 2, 24, 3, 131, 7
    qkv_FD = random((num_heads + 2 * num_kv_heads) * head_dim, width)
    o_DF, x_TD = random(width, num_heads * head_dim), random(num_tokens, width)
    rotation_TC, temperature_T, norm_D = random(num_tokens, head_dim), random(num_tokens), random(width)
    keys = random(10, num_kv_heads, head_dim, 16).to(dtype)  # [slots / 16, G, C, 16]
    values = random(160, num_kv_heads, head_dim).to(dtype)  # [slots, G, C]
    pages = torch.randperm(160 // page_size, generator=torch.Generator().manual_seed(0))
    positions_T = torch.arange(num_tokens) + first_key + num_keys - 1
    slots_T = pages[positions_T // page_size] * page_size + positions_T % page_size
    block = torch.tensor([0, num_tokens, first_key, num_keys, pages.data_ptr(), page_size])

    def attended(native: Any) -> list[Tensor]:
        qkv, o = pack(qkv_FD), pack(o_DF)
        out_TD, kept = x_TD.clone(), (keys.clone(), values.clone())
        shape = (width, num_heads, num_kv_heads, head_dim)
        layer = AttentionLayer(*shape, 1, 1, 1, 1e-5, norm_D.data_ptr(), qkv.address, o.address)
        tables = (rotation_TC.data_ptr(), temperature_T.data_ptr(), slots_T.data_ptr())
        step = AttentionStep(num_tokens, *tables, 1, block.data_ptr())
        cache = Cache(kept[0].data_ptr(), kept[1].data_ptr(), num_kv_heads, head_dim)
        run = getattr(native, f"l4d_attention_float32_{NAME_OF[dtype]}")
        run(byref(layer), byref(step), byref(cache), out_TD.data_ptr(), out_TD.data_ptr(), THREADS)
        return [out_TD, *kept]

    assert_equal(flags, attended)


def assert_equal(flags: tuple[str, ...], compute: Callable[[Any], list[Tensor]]) -> None:
    """Compare what this processor's passes give with what a narrower build gives."""
    narrow, expected = narrow_passes(flags), compute(passes())
    with computing_with(narrow):
        found = compute(narrow)
    assert all(out.isfinite().all() for out in expected), "numbers that are equal to nothing would prove nothing"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
