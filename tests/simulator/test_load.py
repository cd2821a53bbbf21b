from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llama4_dist.errors import ConfigError
from llama4_dist.planner.multinomial import zipf
from llama4_dist.planner.roofline import SliceCost
from llama4_dist.simulator.fleet import Fleet
from llama4_dist.simulator.load import Arrival, check_fits, draw, read_trace
from llama4_dist.simulator.scenario import Event, Scenario, parse_events


def test_arrivals_come_at_the_rate_and_within_the_time() -> None:
    arrivals = draw(rate=50, duration_s=100, prompt_len=100, output_len=10, spread=0.5)
    assert len(arrivals) == pytest.approx(5000, rel=0.05)
    assert all(0 <= one.at_s < 100 and 50 <= one.prompt_len <= 150 for one in arrivals)


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"at_s": 2, "prompt_len": 3, "output_len": 4}\n\n{"at_s": 1.5, "prompt_len": 5, "output_len": 6}\n'
    )
    assert read_trace(file) == (
        Arrival(at_s=1.5, prompt_len=5, output_len=6),
        Arrival(at_s=2.0, prompt_len=3, output_len=4),
    )


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", '{"at_s": 1}',
     '{"at_s": -1, "prompt_len": 1, "output_len": 1}',
     '{"at_s": NaN, "prompt_len": 1, "output_len": 1}',
     '{"at_s": 1, "prompt_len": 1.5, "output_len": 1}', '{"at_s": 1, "prompt_len": 0, "output_len": 1}', "[" * 100_000],
)  # fmt: skip
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at_s": 0, "prompt_len": 1, "output_len": 1}\n' + line)
    with pytest.raises(ConfigError, match="trace line 2"):
        read_trace(file)


def test_a_missing_or_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="holds 0 requests"):
        read_trace(tmp_path / "empty")


def test_requests_that_no_group_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="a request of 30 tokens"):
        check_fits([Arrival(at_s=0.0, prompt_len=20, output_len=10)], 29)


@pytest.mark.parametrize(
    "changes", [{"rate": 0}, {"rate": float("nan")}, {"duration_s": float("inf")}, {"spread": 1}, {"rate": 1e9}]
)
def test_wrong_loads_are_refused(changes: dict[str, float]) -> None:
    fields: dict[str, float] = {"rate": 1, "duration_s": 5, "prompt_len": 1, "output_len": 1}
    with pytest.raises(ConfigError):
        draw(**(fields | changes))  # type: ignore[arg-type]


def test_events_are_read_and_sorted() -> None:
    assert parse_events(["scale:8@30", "kill:1@20.5s"], 4) == (
        Event(at_s=20.5, kind="kill", value=1),
        Event(at_s=30.0, kind="scale", value=8),
    )


@pytest.mark.parametrize(
    "given", ["kill:9@1", "scale:0@1", "kill:1", "kill:x@1", "explode:1@1", "kill:-1@1", "kill:1@nan"]
)
def test_wrong_events_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="event"):
        parse_events([given], 4)


@pytest.mark.parametrize("changes", [{"duration_s": float("nan")}, {"detect_s": -1.0}, {"respawn_s": float("inf")}])
def test_wrong_times_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Scenario(**({"duration_s": 1.0} | changes))


def fleet(num_replicas: int = 1, *, most_slices: int = 99) -> Fleet:
    return Fleet(zipf(8, 0.0), 1, num_replicas, SliceCost(read_s=1.0, row_s=0.01), 4, most_slices)


def test_a_dead_hosts_rows_go_to_the_copies() -> None:
    hosts = fleet(2)
    before = hosts.load(64)
    assert hosts.kill(0) == ()
    assert hosts.load(64).seconds > 1.3 * before.seconds  # one host serves what two did
    hosts.revive(0)
    assert hosts.load(64) == before


def test_lost_slices_are_adopted_where_there_is_room() -> None:
    hosts = fleet(most_slices=3)
    assert len(hosts.kill(0)) == 2
    assert hosts.adopt() == ()
    assert sorted(hosts.adopted.values()) == [1, 2]
    assert len(hosts.kill(1)) == 3  # its own, and what it had taken in
    assert len(hosts.adopt()) == 2  # one place is left with each of the others, and one slice was theirs already
    hosts.revive(0)
    assert len(hosts.lost()) == 0 or hosts.adopt() == ()


def test_times_between_the_draws_are_interpolated() -> None:
    hosts = fleet()
    seconds = [hosts.load(rows).seconds for rows in range(500, 600)]
    assert all(after >= before * 0.999 for before, after in pairwise(seconds))
