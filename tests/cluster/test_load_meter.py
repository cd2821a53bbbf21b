"""Loads and prices from hosts' counters; each figure can be checked by hand."""

import pytest

from cluster.control_plane.load_meter import ENOUGH_ROWS, HORIZON_S, LoadMeter
from cluster.operation import HostLoad
from cluster.planning.loads import ExpertLoads
from cluster.planning.placement import Pair
from tests.cluster.fake_workers import GEOMETRY

A, B = (0, 0), (1, 3)


def host(name: str, at_s: float, rows: dict[Pair, int], *, compute_s: float = 0.0, incarnation: int = 1) -> HostLoad:
    return HostLoad(host=name, incarnation=incarnation, at_s=at_s, rows=rows, compute_s=compute_s)


def test_experts_count_as_equal_until_enough_rows_were_seen() -> None:
    meter = LoadMeter()
    meter.note([host("a", 0, {A: ENOUGH_ROWS - 1})])
    assert meter.loads(GEOMETRY) == ExpertLoads.uniform(GEOMETRY)
    meter.note([host("a", 1, {A: ENOUGH_ROWS - 1, B: 1})])
    assert meter.loads(GEOMETRY).rows == {A: ENOUGH_ROWS - 1, B: 1}


def test_rows_are_summed_over_hosts_and_their_lives() -> None:
    meter = LoadMeter()
    meter.note([host("a", 0, {A: 1000}), host("b", 0, {A: 10, B: 5})])
    meter.note([host("a", 1, {A: 1500}), host("b", 1, {A: 7}, incarnation=2)])
    assert meter.loads(GEOMETRY).rows == {A: 1000 + 500 + 10 + 7, B: 5}


def test_a_price_needs_two_readings_of_a_host() -> None:
    meter = LoadMeter()
    assert meter.prices() == {"seconds_per_row": 0, "horizon_s": HORIZON_S, "bytes_per_s": 1e9, "rows_per_s": 0}
    meter.note([host("a", 100.0, {A: 10**6}, compute_s=2.0), host("b", 5.0, {})])
    assert meter.prices()["rows_per_s"] == 0
    assert meter.prices()["seconds_per_row"] == pytest.approx(2e-6)


def test_rates_count_what_was_seen_and_clocks_of_different_machines_are_not_compared() -> None:
    meter = LoadMeter()
    meter.note([host("a", 1000.0, {A: 500}), host("b", 5.0, {B: 300})])
    meter.note([host("a", 1010.0, {A: 700}), host("b", 15.0, {B: 400})])
    assert meter.prices()["rows_per_s"] == (200 + 100) / 10


def test_a_host_that_began_anew_adds_no_time_in_which_nobody_looked() -> None:
    meter = LoadMeter()
    for at_s, incarnation in ((0.0, 1), (10.0, 1), (500.0, 2), (510.0, 2)):
        meter.note([host("a", at_s, {A: int(at_s)}, incarnation=incarnation)])
    assert meter.prices()["rows_per_s"] == (10 + 10) / 20
