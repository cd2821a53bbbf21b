"""Rates a reader can check by hand: hosts that start anew, join, stand still."""

from cluster.admin.load_rates import LoadRates, LoadReading, rates
from cluster.operation import HostLoad


def reading(taken_s: float, *loads: HostLoad) -> LoadReading:
    return LoadReading(taken_s=taken_s, loads={load.host: load for load in loads})


def host(name: str, at_s: float, rows: dict[tuple[int, int], int], *, incarnation: int = 1) -> HostLoad:
    return HostLoad(host=name, incarnation=incarnation, at_s=at_s, rows=rows, compute_s=sum(rows.values()) / 1000)


def by_pair(found: LoadRates) -> dict[tuple[int, int], float]:
    return {one.pair: one.rows_per_s for one in found.experts}


def test_a_rate_is_the_difference_over_the_hosts_own_time() -> None:
    before = reading(100.0, host("a", 5.0, {(0, 0): 100, (0, 1): 50}))
    now = reading(102.5, host("a", 7.0, {(0, 0): 300, (0, 1): 50}))
    found = rates(before, now, {})
    assert by_pair(found) == {(0, 0): 100.0, (0, 1): 0.0}
    assert (found.window_s, found.hosts[0].rows_per_s) == (2.5, 100.0)
    assert abs(found.hosts[0].busy - 0.1) < 1e-9  # 0.2 s of computing in 2 s


def test_a_host_that_started_anew_counts_from_zero() -> None:
    before = reading(100.0, host("a", 900.0, {(0, 0): 5000}))
    now = reading(102.0, host("a", 3.0, {(0, 0): 40}, incarnation=2))
    found = rates(before, now, {})
    assert by_pair(found) == {(0, 0): 20.0}
    assert found.experts[0].rows == 40


def test_a_host_seen_for_the_first_time_has_no_rate_yet() -> None:
    found = rates(reading(100.0), reading(102.0, host("new", 50.0, {(0, 0): 10_000})), {})
    assert by_pair(found) == {(0, 0): 0.0}
    assert found.hosts[0].rows_per_s == 0.0


def test_a_host_that_is_gone_is_left_out() -> None:
    before = reading(100.0, host("a", 1.0, {(0, 0): 1}), host("b", 1.0, {(0, 1): 1}))
    found = rates(before, reading(101.0, host("b", 2.0, {(0, 1): 3})), {})
    assert [one.load.host for one in found.hosts] == ["b"]
    assert by_pair(found) == {(0, 1): 2.0}


def test_experts_without_a_row_are_listed() -> None:
    found = rates(reading(0.0, host("a", 0.0, {})), reading(1.0, host("a", 1.0, {(0, 1): 4})), {"a": ((0, 0), (0, 1))})
    assert by_pair(found) == {(0, 0): 0.0, (0, 1): 4.0}


def test_counters_that_run_backwards_and_clocks_that_stand_give_zero() -> None:
    before = reading(0.0, host("a", 1.0, {(0, 0): 9}))
    assert by_pair(rates(before, reading(1.0, host("a", 2.0, {(0, 0): 3})), {})) == {(0, 0): 0.0}
    assert by_pair(rates(before, reading(1.0, host("a", 1.0, {(0, 0): 30})), {})) == {(0, 0): 0.0}
