"""Figures of records that a reader can check by hand."""

import itertools
import math

import pytest

from llama4_dist.bench.arrivals import plan, send_times, shares
from llama4_dist.bench.records import RequestRecord
from llama4_dist.bench.statistics import is_good, parse_goodput, percentile, summarise
from llama4_dist.errors import InvalidRequestError


def record(scheduled_s: float, *arrivals_s: float, sent_s: float | None = None) -> RequestRecord:
    """One request whose tokens came one by one."""
    return RequestRecord(
        scheduled_s=scheduled_s,
        sent_s=scheduled_s if sent_s is None else sent_s,
        ended_s=arrivals_s[-1],
        prompt_tokens=4,
        tokens=tuple((at_s, 1) for at_s in arrivals_s),
    )


def refusal(scheduled_s: float, after_s: float) -> RequestRecord:
    ended_s = scheduled_s + after_s
    return RequestRecord(
        scheduled_s=scheduled_s, sent_s=scheduled_s, ended_s=ended_s, prompt_tokens=4, error="QUEUE_FULL"
    )


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([5.0], 99, 5.0), ([1.0, 2.0], 50, 1.5), ([4.0, 1.0, 3.0, 2.0], 50, 2.5), ([0.0, 10.0], 99, 9.9)],
)
def test_a_percentile_lies_between_its_two_neighbours(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_a_percentile_is_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    values = [((7 * number) % 101) ** 1.5 for number in range(101)]
    for percent in (1, 37, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))


def test_latency_counts_from_the_time_a_request_was_to_be_sent() -> None:
    """A client that came 0.4 s late must not make the server look fast (coordinated omission)."""
    late = record(1.0, 1.5, 1.6, 1.8, sent_s=1.4)
    assert late.ttft_s == pytest.approx(0.5)
    assert late.e2el_s == pytest.approx(0.8)
    assert late.tpot_s == pytest.approx(0.15)
    assert late.itls_s == pytest.approx((0.1, 0.2))


def test_a_message_of_several_tokens_is_one_gap_and_all_its_tokens() -> None:
    joined = RequestRecord(
        scheduled_s=0.0, sent_s=0.0, ended_s=1.0, prompt_tokens=1, tokens=((0.2, 1), (0.6, 3), (1.0, 1))
    )
    assert joined.output_tokens == 5
    assert joined.tpot_s == pytest.approx(0.2)
    assert joined.itls_s == pytest.approx((0.4, 0.4))


def test_the_summary_of_three_requests_by_hand() -> None:
    records = [record(0.0, 0.1, 0.2), record(1.0, 1.3, 2.0), refusal(1.5, 0.004)]
    found = summarise(records, {"ttft": 200.0})
    assert (found["num_prompts"], found["completed"], found["failed"]) == (3, 2, 1)
    assert found["errors"] == {"QUEUE_FULL": 1}
    assert found["duration"] == pytest.approx(2.0)
    assert found["request_throughput"] == pytest.approx(1.0)
    assert found["output_throughput"] == pytest.approx(2.0)
    assert found["goodput"] == pytest.approx(0.5)  # the second took 300 ms to its first token
    assert found["mean_ttft_ms"] == pytest.approx(200.0)
    assert found["median_e2el_ms"] == pytest.approx(600.0)
    assert found["p99_refusal_ms"] == pytest.approx(4.0)


def test_a_window_leaves_out_what_lies_before_and_after() -> None:
    records = [record(0.0, 0.5, 1.5), record(2.0, 2.5, 3.5), record(3.9, 4.5, 5.5)]
    found = summarise(records, {}, skip_s=1.0, until_s=4.0)
    assert found["num_prompts"] == 2
    assert found["output_throughput"] == pytest.approx(3 / 3.0)  # at 1.5, 2.5 and 3.5
    assert found["request_throughput"] == pytest.approx(2 / 3.0)  # ended at 1.5 and 3.5


def test_nothing_completed_is_no_figure_and_no_crash() -> None:
    found = summarise([refusal(0.0, 0.001)], {"ttft": 1.0})
    assert found["goodput"] == 0.0
    assert found["mean_ttft_ms"] is None
    assert found["p99_tpot_ms"] is None


@pytest.mark.parametrize("given", ["ttft", "ttft:", "ttft:-1", "ttft:x", "speed:5", "ttft:0"])
def test_an_objective_that_is_none_is_named(given: str) -> None:
    with pytest.raises(InvalidRequestError, match="METRIC:MILLISECONDS"):
        parse_goodput(given)


def test_objectives_are_read_and_all_must_hold() -> None:
    objectives = parse_goodput("ttft:150, tpot:50")
    assert objectives == {"ttft": 150.0, "tpot": 50.0}
    assert is_good(record(0.0, 0.1, 0.14), objectives)
    assert not is_good(record(0.0, 0.16, 0.18), objectives)
    assert not is_good(record(0.0, 0.1, 0.2), objectives)
    assert not is_good(refusal(0.0, 0.001), objectives)


def test_send_times_have_their_rate_and_repeat_with_their_seed() -> None:
    poisson = send_times(50.0, 5001, seed=1)
    assert poisson == send_times(50.0, 5001, seed=1)
    assert poisson != send_times(50.0, 5001, seed=2)
    assert poisson[-1] == pytest.approx(100.0, rel=0.05)
    assert send_times(4.0, 4, seed=0, burstiness=math.inf) == [0.0, 0.25, 0.5, 0.75]
    assert send_times(math.inf, 3, seed=0) == [0.0, 0.0, 0.0]


def test_gaps_of_a_poisson_process_vary_as_much_as_they_last() -> None:
    """Standard deviation = mean; a smaller burstiness varies more."""
    gaps = [
        [after - before for before, after in itertools.pairwise(times)]
        for times in (send_times(10.0, 8000, seed=3), send_times(10.0, 8000, seed=3, burstiness=0.25))
    ]
    deviations = [(sum((gap - 0.1) ** 2 for gap in one) / len(one)) ** 0.5 for one in gaps]
    assert deviations[0] == pytest.approx(0.1, rel=0.1)
    assert deviations[1] == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(InvalidRequestError, match="rate"):
        send_times(rate, 1, seed=0)


def test_a_plan_has_lengths_and_its_shares_miss_nothing() -> None:
    requests = plan([0.0, 0.5, 1.0], input_len=7, output_len=3, vocab_size=50, seed=0)
    assert all(len(one.prompt_token_ids) == 7 and max(one.prompt_token_ids) < 50 for one in requests)
    assert len({one.prompt_token_ids for one in requests}) == 3
    assert sorted(sum(shares(requests, 2), ()), key=lambda one: one.at_s) == list(requests)
    with pytest.raises(InvalidRequestError, match="output_len"):
        plan([0.0], input_len=1, output_len=0, vocab_size=5, seed=0)
