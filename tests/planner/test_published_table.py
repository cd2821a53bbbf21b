"""Every entry of the published decode table, within 3 % or half a unit of its last printed digit."""

from dataclasses import replace

import pytest

from llama4_dist.planner.hardware import HARDWARE, Efficiency, rates
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.roofline import expert_load
from llama4_dist.planner.step import StepTimes
from tests.planner.cases import geometry, step, uniform
from tests.planner.published import ROWS, Row


def layout_of(row: Row) -> Layout:
    return Layout(
        groups=row.groups,
        ranks=row.ranks,
        hosts=row.hosts,
        gpus_per_host=row.gpus_per_host,
        sequences=row.batch,
        microbatches=row.m,
        dtype=row.dtype,
        wire=row.dtype,
        kv_dtype=row.dtype,
        link=row.link,
    )


def agrees(computed: float, printed: float, unit: float) -> bool:
    return computed == pytest.approx(printed, rel=0.03, abs=unit / 2 + 1e-9)


def figures(row: Row, found: StepTimes) -> dict[str, tuple[float, float, float]]:
    """Name each figure: computed, printed, the unit of the last printed digit."""
    terms, layout = found.terms, layout_of(row)
    rate = layout.total_sequences / found.step_s / layout.num_gpus
    return {
        "T_attn us": (1e6 * terms.attention_s, row.attention, 1.0),
        "T_sh us": (1e6 * terms.shared_s, row.shared, 1.0),
        "T_E us": (1e6 * terms.expert_s, row.expert, 1.0),
        "T_d us": (1e6 * terms.dispatch_s, row.dispatch, 1.0),
        "T_c us": (1e6 * terms.combine_s, row.combine, 1.0),
        "layer us": (1e6 * found.layer_s, row.layer, 1.0),
        "TPOT ms": (1e3 * found.step_s, row.tpot_ms, 0.1),
        "tok/s/GPU": (rate, row.rate, 1.0),
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_figure_of_the_row_is_reproduced(row: Row) -> None:
    found = step(row.model, layout_of(row))
    wrong = {
        name: (got, want) for name, (got, want, unit) in figures(row, found).items() if not agrees(got, want, unit)
    }
    assert not wrong
    assert layout_of(row).num_gpus == row.gpus
    if row.needed is not None:
        assert found.terms.microbatches_needed == pytest.approx(row.needed, rel=0.03)


def test_the_dense_layers_of_maverick_are_what_the_table_leaves_over() -> None:
    """48A+16E prints 658 us a layer and 31.8 ms: (31.8 - 24 x 0.658 - 0.27 head) / 24 = 656 us for a dense layer.

    One attention over the batch whole would leave 576 + 66 = 642; two halves of all, 2 x (296 + 66) = 723. The table
    has attention in two parts and the network once, 2 x 296 + 66 = 658: so the formula counts it.
    """
    row = next(row for row in ROWS if row.name == "maverick 48A+16E nvlink")
    found = step(row.model, layout_of(row))
    left_over_us = (1e3 * row.tpot_ms - 24 * row.layer - 1e6 * found.head_s) / 24
    assert 1e6 * found.dense_layer_s == pytest.approx(left_over_us, rel=0.01)


@pytest.mark.parametrize(
    ("alpha_us", "tpot_ms"), [(5, 36.1), (10, 37.1), (50, 44.8), (200, 73.6), (1000, 227.0), (2000, 419.0)]
)
def test_the_fixed_cost_of_a_message_costs_what_was_published(alpha_us: float, tpot_ms: float) -> None:
    layout = Layout(ranks=8, hosts=16, sequences=32)
    assert 1e3 * step("behemoth", layout, alpha_s=alpha_us * 1e-6).step_s == pytest.approx(tpot_ms, rel=0.01)


@pytest.mark.parametrize(("context", "needed"), [(2048, 5.2), (8192, 4.2), (32768, 3.6), (131072, 2.5)])
def test_longer_contexts_hide_more(context: int, needed: float) -> None:
    """Printed for 4xTP8 with B_a = 128: how many microbatches would hide dispatch (a part of 64 sequences each)."""
    layout = Layout(groups=4, ranks=8, hosts=16, sequences=128, microbatches=2)
    assert step("behemoth", layout, context=context).terms.microbatches_needed == pytest.approx(needed, rel=0.03)


def test_experts_that_are_not_pooled_read_once_per_group() -> None:
    """Printed: 8 groups x 308 us = 2.5 ms of a layer instead of 0.3."""
    layout = Layout(groups=8, ranks=8, hosts=16, sequences=32)
    h200 = rates(HARDWARE["H200"], Efficiency(), dtype="fp8", link="nic")
    loose = expert_load(geometry("behemoth"), layout, h200, 256, replace(uniform("behemoth"), pooled=False))
    assert 1e3 * loose.seconds == pytest.approx(2.5, rel=0.02)
