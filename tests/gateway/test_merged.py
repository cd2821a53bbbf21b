"""Senders of rows that several collectors know: one family, a series for each, none for who sends nothing."""

from collections.abc import Iterable

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from llama4_dist.dispatch.stats import DispatchCounters, DispatchStats
from llama4_dist.engine.port import EngineStats
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.observe.dispatch_families import Sender, alone, dispatch_metrics
from llama4_dist.gateway.observe.engine_families import engine_metrics
from tests.scraping import Scrape

MEMBER = Sender("attention-1-stage-0-rank-0", "attention-1", "0", "0")
TWO_HOSTS = {"expert-0": "unix", "expert-1": "tcp"}


class Known(Collector):
    """Tells what it was given."""

    def __init__(self, *families: Metric) -> None:
        self._families = families

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        return self._families


def test_a_family_that_two_collectors_know_is_exported_once_with_all_series() -> None:
    engines = {
        "attention-0": EngineStats(host_transports=TWO_HOSTS, host_rows={"expert-0": 5}),
        "attention-1": EngineStats(wrong_answers={"expert-0": 1}),  # a leader: what its members proved it knows
    }
    members = {MEMBER: DispatchCounters(host_transports=TWO_HOSTS, host_rows={"expert-0": 7, "expert-1": 2})}
    text = generate_latest(
        Metrics([Known(*engine_metrics(engines, {})), Known(*dispatch_metrics(members))]).registry
    ).decode()
    kinds = [line for line in text.splitlines() if line.startswith("# TYPE llama4_dist_dispatch_rows_total")]
    assert len(kinds) == 1
    found = Scrape(text_string_to_metric_families(text))
    rows = {group: sum(found.all("dispatch_rows_total", group=group)) for group in ("attention-0", "attention-1")}
    assert rows == {"attention-0": 5, "attention-1": 9}
    assert found.value("dispatch_rows_total", worker=MEMBER.worker, stage="0", rank="0", host="expert-1") == 2
    for name in ("wrong_answers_total", "resent_rows_total", "latency_seconds_count"):
        assert found.labels(f"dispatch_{name}", "worker") == {"attention-0", MEMBER.worker}, "its members tell of them"
    assert found.value("engine_up", worker="attention-1") == 1.0


def test_a_host_has_its_series_before_anything_happens_with_it() -> None:
    """What begins at 1 has not grown, for Prometheus: the first wrong answer would raise no alarm."""
    counted = DispatchStats(transports=dict(TWO_HOSTS))
    found = Scrape(dispatch_metrics({alone("attention-0"): DispatchCounters(**counted.told())}))
    for name in ("rows", "hedged_rows", "wrong_answers", "reply_seconds"):
        assert found.all(f"dispatch_{name}_total", group="attention-0") == [0.0, 0.0]
        assert found.labels(f"dispatch_{name}_total", "host") == TWO_HOSTS.keys()


def test_what_is_told_is_a_copy_with_every_counter() -> None:
    counted = DispatchStats(resent_rows=3, late_replies=4, checked_frames=5, wait_seconds=0.5)
    counted.transports["expert-0"] = "unix"
    for counter in (counted.rows_out, counted.bytes_out, counted.bytes_in, counted.hedged, counted.wrong_answers):
        counter["expert-0"] += 2
    counted.refusals["BUSY"] += 1
    counted.lost_hosts["PEER_CLOSED"] += 1
    counted.count_reply("expert-0", 0.25)
    told = DispatchCounters(**counted.told())
    empty = [name for name in DispatchCounters.__dataclass_fields__ if not getattr(told, name)]
    assert not empty
    counted.rows_out["expert-0"] += 1
    assert told.host_rows == {"expert-0": 2}
