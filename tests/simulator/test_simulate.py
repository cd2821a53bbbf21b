"""A simulated cluster keeps the laws that a real one keeps: tokens, queues, capacity, and what deaths cost."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from llama4_dist.planner.layout import Layout
from llama4_dist.planner.plan import Plan, evaluate
from llama4_dist.planner.request import PlanRequest
from llama4_dist.planner.roofline import decode_work, slice_cost
from llama4_dist.planner.step import step_of
from llama4_dist.simulator.fleet import Fleet
from llama4_dist.simulator.load import Arrival, draw
from llama4_dist.simulator.result import SimulationResult
from llama4_dist.simulator.scenario import Event, Scenario
from llama4_dist.simulator.simulate import simulate
from tests.planner.cases import request

LAYOUT = Layout(groups=2, hosts=4, sequences=16)
LOAD = draw(rate=20, duration_s=6, prompt_len=200, output_len=40, spread=0.5, seed=3)


def planned(layout: Layout = LAYOUT, **changes: object) -> tuple[PlanRequest, Plan]:
    asked = request("scout", 8, **changes)
    return asked, evaluate(asked, layout)


def run(
    arrivals: Sequence[Arrival],
    *events: Event,
    layout: Layout = LAYOUT,
    duration_s: float = 60.0,
    respawn_s: float = 5.0,
) -> SimulationResult:
    asked, plan = planned(layout)
    return simulate(asked, plan, arrivals, Scenario(duration_s=duration_s, events=events, respawn_s=respawn_s))


def together(number: int, *, prompt_len: int = 64, output_len: int = 200) -> list[Arrival]:
    return [Arrival(at_s=0.0, prompt_len=prompt_len, output_len=output_len) for _ in range(number)]


def gap_s(result: SimulationResult, at_s: float) -> float:
    """Return how long no token came around a time."""
    times = [token_s for record in result.records for token_s, _ in record.tokens]
    return min(time for time in times if time > at_s) - max(time for time in times if time <= at_s)


def longest_gap_s(result: SimulationResult) -> float:
    """Return the longest time in which no token came."""
    times = sorted({at_s for record in result.records for at_s, _ in record.tokens})
    return max(after - before for before, after in pairwise(times))


def test_every_request_gets_its_tokens_in_order() -> None:
    result = run(LOAD)
    assert len(result.records) == len(LOAD)
    wanted = sorted((arrival.at_s, arrival.prompt_len, arrival.output_len) for arrival in LOAD)
    assert sorted((one.scheduled_s, one.prompt_tokens, one.output_tokens) for one in result.records) == wanted
    tokens = sum(row["tokens_per_s"] * result.timeline.width_s for row in result.rows())
    assert tokens == pytest.approx(sum(arrival.output_len for arrival in LOAD))
    for record in result.records:
        times = [at_s for at_s, _ in record.tokens]
        assert times == sorted(times)
        assert times[0] > record.scheduled_s


def test_the_same_load_gives_the_same_run() -> None:
    one, two = run(LOAD, Event(at_s=2.0, kind="kill", value=1)), run(LOAD, Event(at_s=2.0, kind="kill", value=1))
    assert one.records == two.records
    assert one.rows() == two.rows()
    assert draw(rate=20, duration_s=6, prompt_len=200, output_len=40, seed=3) != draw(
        rate=20, duration_s=6, prompt_len=200, output_len=40, seed=4
    )


@pytest.mark.parametrize("stages", [1, 2])
def test_a_full_batch_decodes_in_the_planners_time(stages: int) -> None:
    """All sequences at context 64 to 264: TPOT is that of the formulae at the middle, with the same expert draws."""
    layout = replace(LAYOUT, groups=1, stages=stages)
    asked, plan = planned(layout)
    result = run(together(16), layout=layout)
    fleet = Fleet(
        asked.traffic.popularity, 1, 1, slice_cost(asked.geometry, layout, asked.rates(layout)), layout.hosts, 99
    )
    expected = step_of(
        asked.geometry, layout, asked.rates(layout), decode_work(asked.geometry, 16, 164), fleet.load
    ).step_s
    for record in result.records:
        assert record.tpot_s == pytest.approx(expected, rel=0.02)
    assert plan.step.step_s > expected  # at context 8192


def test_groups_meet_at_the_hosts() -> None:
    """Two hosts read more experts, and compute more rows, for four groups than for one: the pooled step."""
    layout = replace(LAYOUT, groups=4, hosts=2, sequences=8)
    asked, _ = planned(layout)
    alone = run(together(8), layout=replace(layout, groups=1)).summary(60)["median_tpot_ms"]
    four = run(together(32), layout=layout).summary(60)["median_tpot_ms"]
    fleet = Fleet(asked.traffic.popularity, 1, 1, slice_cost(asked.geometry, layout, asked.rates(layout)), 2, 99)
    work = decode_work(asked.geometry, 8, 164)
    pooled = step_of(asked.geometry, layout, asked.rates(layout), work, lambda rows: fleet.load(4 * rows)).step_s
    assert four == pytest.approx(1e3 * pooled, rel=0.03)
    assert four > 1.3 * alone  # type: ignore[operator]


def test_littles_law_holds() -> None:
    """The mean number in the system is the rate times the mean time in it."""
    arrivals = draw(rate=15, duration_s=40, prompt_len=100, output_len=50, seed=1)
    result = run(arrivals, duration_s=60)
    in_system_s = sum(record.ended_s - record.scheduled_s for record in result.records)
    mean_number = sum(row["waiting"] + row["running"] for row in result.rows()) / len(result.rows())
    length_s = len(result.rows()) * result.timeline.width_s
    assert mean_number * length_s == pytest.approx(in_system_s, rel=0.15)


def test_more_load_waits_longer_and_never_runs_more_than_the_batch() -> None:
    light, heavy = run(together(8)), run(together(200))
    assert max(row["running"] for row in heavy.rows()) <= 2 * 16
    assert heavy.summary(60)["p99_ttft_ms"] > 5 * light.summary(60)["p99_ttft_ms"]  # type: ignore[operator]


def test_small_caches_preempt_and_lose_nothing() -> None:
    asked, plan = planned()
    small = replace(plan, memory=replace(plan.memory, per_gpu=plan.memory.attention_weights + 12 * 100e6))
    arrivals = together(40, prompt_len=700, output_len=300)
    result = simulate(asked, small, arrivals, Scenario(duration_s=300))
    assert len(result.records) == 40
    assert all(record.output_tokens == 300 for record in result.records)
    assert max(row["running"] for row in result.rows()) < 32


def test_a_death_without_a_copy_costs_reading_the_lost_experts() -> None:
    """A quarter of Scout's experts, 4 x 6.04 GB, read by three hosts at 40 GB/s: two columns each, 0.30 s."""
    quiet, struck = run(LOAD), run(LOAD, Event(at_s=3.0, kind="kill", value=1))
    assert gap_s(struck, 3.0) - gap_s(quiet, 3.0) == pytest.approx(2 * 6.04 / 40 + 0.02, rel=0.25)
    assert len(struck.records) == len(LOAD)


def test_a_death_with_a_copy_costs_no_more_than_noticing_it() -> None:
    layout = replace(LAYOUT, replicas=2)
    quiet, struck = run(LOAD, layout=layout), run(LOAD, Event(at_s=3.0, kind="kill", value=1), layout=layout)
    assert gap_s(struck, 3.0) <= gap_s(quiet, 3.0) + 0.03
    assert "0 slices of a layer had no other copy" in struck.happened[0][1]


def test_a_host_returns_after_its_process_and_its_weights() -> None:
    result = run(LOAD, Event(at_s=3.0, kind="kill", value=1))
    died, back = result.happened
    assert back[0] - died[0] == pytest.approx(5.0 + 4 * 6.04 / 40, rel=0.01)
    assert {row["hosts"] for row in result.rows() if died[0] + 1 < row["at_s"] < back[0] - 1} == {3}


def test_what_fits_no_living_host_waits_for_the_successor() -> None:
    """Behemoth's expert column is 114 GB: no H200 holds two, so all wait until the dead host is back."""
    asked = request("behemoth", 24)
    plan = evaluate(asked, Layout(ranks=8, hosts=16, sequences=4))
    events = (Event(at_s=1.0, kind="kill", value=3),)
    result = simulate(asked, plan, together(4, output_len=100), Scenario(duration_s=60, events=events, respawn_s=5.0))
    assert "fit no living host" in result.happened[1][1]
    assert longest_gap_s(result) == pytest.approx(5.0 + 113.6 / 40, rel=0.05)
    assert len(result.records) == 4


def test_scaling_up_raises_throughput_and_stops_nobody() -> None:
    arrivals, layout = together(400, output_len=150), replace(LAYOUT, hosts=1, sequences=64)
    small, grown = run(arrivals, layout=layout), run(arrivals, Event(at_s=0.5, kind="scale", value=8), layout=layout)
    assert max(one.ended_s for one in grown.records) < max(one.ended_s for one in small.records)
    assert longest_gap_s(grown) <= longest_gap_s(small) * 1.05
    assert any("8 hosts serve" in text for _, text in grown.happened)


def test_scaling_beyond_the_slices_is_refused_and_changes_nothing() -> None:
    result = run(LOAD, Event(at_s=1.0, kind="scale", value=99))
    assert "refused" in result.happened[0][1]
    assert result.records == run(LOAD).records


def test_prompts_are_cut_so_that_readers_go_on() -> None:
    """Beside decodes a long prompt comes in chunks: a step is at most about twice a decode step."""
    arrivals = [*together(8, output_len=400), Arrival(at_s=1.0, prompt_len=8000, output_len=2)]
    result = run(arrivals, layout=replace(LAYOUT, groups=1))
    gaps = [after[0] - before[0] for record in result.records for before, after in pairwise(record.tokens)]
    usual = sorted(gaps)[len(gaps) // 2]
    assert max(gaps) < 6 * usual


def test_busy_shares_are_shares() -> None:
    for row in run(LOAD).rows():
        assert 0 <= row["attention_busy"] <= 1
        assert 0 <= row["expert_busy"] <= 1
        assert math.isfinite(row["tokens_per_s"])
