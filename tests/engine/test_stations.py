"""Times by station: nothing counted twice, nothing left out, one number per station and step."""

import time
from pathlib import Path

import pytest

from llama4_dist import stations as places
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.snapshot import add_stats
from llama4_dist.gateway.observe.engine_families import engine_metrics
from llama4_dist.stations import BOUNDS_S, Stations, buckets
from tests.checkpoints import make_checkpoint
from tests.engine.sequences import request


def test_marks_part_the_time_among_stations(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = iter([100, 130, 150, 1150, 1151])
    monkeypatch.setattr(places, "perf_counter_ns", lambda: next(now_ns))
    stations = Stations()
    stations.begin()
    for station in (places.ATTENTION, places.ROUTE, places.ATTENTION, places.OTHER):
        stations.mark(station)
    assert stations.step_ns[places.ATTENTION] == 1030
    assert stations.step_ns[places.ROUTE] == 20
    assert sum(stations.step_ns) == 1151 - 100
    stations.end_step()
    assert sum(stations.step_ns) == 0
    assert stations.seconds()["attention"] == pytest.approx(1030e-9)


def test_a_step_falls_into_the_bucket_that_holds_it() -> None:
    stations = Stations()
    for nanoseconds in (10_000, 10_001, 10**10):  # the first bound is 10 µs, and the last 5 s
        stations.add(places.SAMPLE, nanoseconds)
        stations.end_step()
    numbers = buckets(stations.steps(), "sample")
    assert len(numbers) == len(BOUNDS_S) + 1
    assert (numbers[0], numbers[1], numbers[-1], sum(numbers)) == (1, 1, 1, 3)
    assert sum(buckets(stations.steps(), "route")) == 0  # not touched, hence not counted as 0 s


def test_an_engine_says_where_its_steps_spent_their_time_and_engines_add_up(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "scout")
    engine = build_single_process(model_dir, options=EngineOptions(num_blocks=64), num_threads=1)
    try:
        engine.start(lambda outputs: None)
        began_s = time.perf_counter()
        engine.submit(request("r", (1, 2, 3), max_tokens=8))
        while engine.stats().requests_finished == 0:
            time.sleep(0.005)
        wall_s = time.perf_counter() - began_s
        stats = engine.stats()
    finally:
        engine.close()
    seconds = stats.station_seconds
    assert stats.steps == 8
    assert all(sum(buckets(stats.station_steps, name)) == 8 for name in ("schedule", "model", "sample", "expert"))
    assert 0 < seconds["expert"] < seconds["model"]
    inside = sum(seconds[name] for name in ("attention", "route", "expert", "dispatch_wait", "combine", "other"))
    assert inside == pytest.approx(seconds["model"], rel=0.05, abs=1e-4)
    assert seconds["schedule"] + seconds["model"] + seconds["sample"] < wall_s
    both = add_stats([stats, stats])
    assert sum(buckets(both.station_steps, "model")) == 16
    exported = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in engine_metrics({"local": stats}, {})
        for sample in family.samples
        if sample.labels.get("station") == "model"
    }
    assert exported["llama4_dist_station_seconds_count", None] == 8
    assert exported["llama4_dist_station_seconds_sum", None] == pytest.approx(seconds["model"])
    assert exported["llama4_dist_station_seconds_bucket", "+Inf"] == 8
