"""What the planner proposes is legal, fits and is in order; what is impossible is refused with the reason."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_dist.errors import ConfigError
from llama4_dist.planner.explain import explain
from llama4_dist.planner.hardware import Efficiency, find_hardware, rates
from llama4_dist.planner.layout import Layout, objections
from llama4_dist.planner.parse import parse_hardware, parse_layout
from llama4_dist.planner.plan import refusals
from llama4_dist.planner.request import Objective
from llama4_dist.planner.search import search
from tests.planner.cases import geometry, request, step, uniform


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize(("model", "num_gpus"), [("behemoth", 96), ("scout", 8), ("maverick", 32)])
def test_every_plan_is_legal_fits_and_the_best_comes_first(model: str, num_gpus: int, objective: Objective) -> None:
    asked = request(model, num_gpus, objective=objective)
    plans = search(asked, top=8).plans
    for plan in plans:
        assert refusals(asked, plan.layout) == []
        assert plan.layout.num_gpus <= num_gpus
    figures = {
        Objective.THROUGHPUT: [-plan.tokens_per_s for plan in plans],
        Objective.LATENCY: [plan.step.step_s for plan in plans],
        Objective.COST: [plan.price_per_million_tokens for plan in plans],
    }[objective]
    assert figures == pytest.approx(sorted(figures), rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(num_gpus=st.integers(24, 200), slo_ms=st.floats(15, 120))
def test_plans_are_in_time_or_the_fastest_is_named(num_gpus: int, slo_ms: float) -> None:
    asked = request(num_gpus=num_gpus, slo_tpot_s=slo_ms / 1e3)
    try:
        found = search(asked)
    except ConfigError as refused:
        assert re.search("the fastest|no layout", refused.message)  # noqa: PT017 - either outcome is right
    else:
        assert all(plan.step.step_s <= slo_ms / 1e3 for plan in found.plans)


def test_a_longer_time_never_lowers_throughput() -> None:
    rates_found = [search(request(slo_tpot_s=ms / 1e3)).plans[0].tokens_per_s for ms in (30, 60, 120)]
    assert rates_found == sorted(rates_found)


def test_single_streams_get_wider_experts() -> None:
    """One expert read sets the time of a single stream: 34.5 ms were published with one GPU an expert, 8.5 with 8."""
    best = search(request(num_gpus=136, objective=Objective.LATENCY)).plans[0]
    assert best.layout.slices >= 8
    assert 1e3 * best.step.step_s < 8.5


def test_slices_send_a_row_to_each_of_their_hosts() -> None:
    whole = step("behemoth", Layout(ranks=8, hosts=16, sequences=512)).terms
    halves = step("behemoth", Layout(ranks=8, hosts=32, slices=2, sequences=512)).terms
    assert halves.expert_s == pytest.approx(whole.expert_s / 2, rel=0.02)
    assert halves.dispatch_s - 10e-6 == pytest.approx(2 * (whole.dispatch_s - 10e-6), rel=0.01)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(ranks=3, hosts=16), "num_ranks=3 does not divide num_heads=128"),
        (Layout(stages=97, hosts=16), "num_stages=97 exceeds num_layers=96"),
        (Layout(slices=2, hosts=1), "need 2 hosts, not 1"),
        (Layout(replicas=2, hosts=1), "need 2 hosts, not 1"),
        (Layout(hosts=17), "17 hosts are more than the 16 slices"),
        (Layout(microbatches=2, hosts=16), "microbatches=2 exceed the batch of 1"),
    ],
)
def test_an_illegal_layout_is_refused_with_the_reason(layout: Layout, reason: str) -> None:
    assert any(reason in found for found in objections(layout, geometry("behemoth").config))


def test_ranks_that_straddle_kv_heads_are_refused() -> None:
    (found,) = objections(Layout(ranks=20, hosts=16), geometry("scout").config)
    assert found.startswith("num_ranks=20 neither divides num_kv_heads=8 nor is a multiple of it")


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(ranks=8, hosts=8), "an expert GPU would hold 227.1 GB"),
        (Layout(ranks=1, hosts=16), "of weights and has 133.9 GB: raise P or T"),
        (Layout(ranks=8, hosts=16, sequences=1000), "at most 556 fit"),
        (Layout(ranks=8, groups=20, hosts=16), "it needs 176 devices and there are 96"),
        (Layout(ranks=16, hosts=16), "T=16 reaches over nodes of 8"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(layout: Layout, reason: str) -> None:
    assert any(reason in found for found in refusals(request(), layout))


def test_too_few_devices_are_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 8xH200 serves behemoth in fp8 at context 8192: .*"):
        search(request(num_gpus=8))


@pytest.mark.parametrize(
    "given", ["", "H200", "96", "x", "0xH200", "-1xH200", "1e3xH200", "96xH999", "99999999xH200", "9 6xH200"]
)
def test_malformed_hardware_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"give|not in the table"):
        parse_hardware(given)


def test_hardware_is_read_in_any_case() -> None:
    assert parse_hardware("96xh200") == (96, find_hardware("H200"))


@pytest.mark.parametrize(
    "given",
    [
        "groups=8",
        "hosts=8",
        "groups=0,hosts=1",
        "groups=1,hosts=1,T=x",
        "groups=1,hosts=1,Q=2",
        "groups=1,hosts=1,groups=2",
        "groups=1,hosts=99999999",
    ],
)
def test_malformed_layouts_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="layout"):
        parse_layout(given, Layout())


def test_a_layout_reads_back_what_it_says() -> None:
    layout = Layout(stages=2, ranks=8, groups=3, hosts=32, slices=2, replicas=2, sequences=64, microbatches=2)
    assert parse_layout(layout.describe(), Layout()) == layout


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(ConfigError):
        request(slo_tpot_s=value)
    with pytest.raises(ConfigError):
        request(price_per_hour=value)
    with pytest.raises(ConfigError):
        Efficiency(memory=value)


@pytest.mark.parametrize("context", [0, -1, 1 << 40])
def test_contexts_beyond_the_model_are_refused(context: int) -> None:
    with pytest.raises(ConfigError, match="context"):
        request(traffic=uniform("behemoth", context))


def test_formats_that_a_device_does_not_multiply_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiplies no fp8"):
        rates(find_hardware("CPU"), Efficiency(), dtype="fp8", link="nic")
    with pytest.raises(ConfigError, match="nobody has measured"):
        rates(find_hardware("H100"), Efficiency(), dtype="bf16", link="nic", measured=True)


def test_measured_rates_take_no_factor() -> None:
    found = rates(find_hardware("H200"), Efficiency(), dtype="bf16", link="nic", measured=True)
    assert (found.memory, found.flops) == (4.3e12, 785e12)


def test_the_first_sentence_names_what_binds() -> None:
    asked = request(slo_tpot_s=0.06)
    assert "binds" in explain(asked, search(asked).plans[0])[0] or "bind" in explain(asked, search(asked).plans[0])[0]
