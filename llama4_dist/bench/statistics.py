"""Turns records of requests into figures under the names of vLLM's `bench serve`; pure.

A percentile is the linear interpolation between the two nearest of the sorted values (NumPy's and vLLM's default, R-7).
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from llama4_dist.bench.records import RequestRecord, wrong

PERCENTILES = (50, 90, 99)
OBJECTIVES = ("ttft", "tpot", "e2el")


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile of at least one value."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(name: str, values: Iterable[float]) -> dict[str, float | None]:
    """Return mean, median, standard deviation and percentiles of milliseconds; None of no values."""
    known = list(values)
    if not known:
        return dict.fromkeys([f"mean_{name}_ms", f"median_{name}_ms", *(f"p{p}_{name}_ms" for p in PERCENTILES)])
    return {
        f"mean_{name}_ms": statistics.fmean(known),
        f"median_{name}_ms": statistics.median(known),
        f"std_{name}_ms": statistics.pstdev(known),
        **{f"p{percent}_{name}_ms": percentile(known, percent) for percent in PERCENTILES},
    }


def parse_goodput(given: str) -> dict[str, float]:
    """Read "ttft:500,tpot:50" (milliseconds) into service level objectives by metric."""
    objectives: dict[str, float] = {}
    for part in filter(None, given.replace(" ", ",").split(",")):
        name, colon, limit = part.partition(":")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = 0.0
        if name not in OBJECTIVES or not colon or not limit_ms > 0:
            raise wrong("goodput", f"{part!r}: give METRIC:MILLISECONDS, metrics {', '.join(OBJECTIVES)}")
        objectives[name] = limit_ms
    return objectives


def is_good(record: RequestRecord, objectives: Mapping[str, float]) -> bool:
    """Tell whether a request completed within every objective (milliseconds)."""
    if not record.completed:
        return False
    reached_s = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.e2el_s}
    return all(reached_s[name] * 1e3 <= limit_ms for name, limit_ms in objectives.items())


def summarise(
    records: Sequence[RequestRecord],
    objectives: Mapping[str, float],
    *,
    skip_s: float = 0.0,
    until_s: float | None = None,
) -> dict[str, object]:
    """Return the figures of one run.

    Requests scheduled before `skip_s` or after `until_s` are left out, and throughputs then count what happened within
    that window. Without a window, throughput is over the time from the first scheduled send to the last event.
    """
    if until_s is None:
        until_s = max((record.ended_s for record in records), default=0.0)
    counted = [record for record in records if skip_s <= record.scheduled_s <= until_s]
    done = [record for record in counted if record.completed]
    duration_s = max(until_s - skip_s, 1e-9)
    arrivals = [(at_s, number) for record in records for at_s, number in record.tokens if skip_s <= at_s <= until_s]
    ended = [record for record in records if record.completed and skip_s <= record.tokens[-1][0] <= until_s]
    refused_ms = [1e3 * (record.ended_s - record.scheduled_s) for record in counted if record.error is not None]
    return {
        "duration": duration_s,
        "num_prompts": len(counted),
        "completed": len(done),
        "failed": len(counted) - len(done),
        "errors": dict(Counter(record.error for record in counted if record.error is not None)),
        "total_input_tokens": sum(record.prompt_tokens for record in done),
        "total_output_tokens": sum(number for _, number in arrivals),
        "request_throughput": len(ended) / duration_s,
        "output_throughput": sum(number for _, number in arrivals) / duration_s,
        "goodput": sum(is_good(record, objectives) for record in ended) / duration_s,
        "goodput_objectives_ms": dict(objectives),
        **spread("ttft", [1e3 * record.ttft_s for record in done]),
        **spread("tpot", [1e3 * tpot_s for record in done if (tpot_s := record.tpot_s) is not None]),
        **spread("itl", [1e3 * gap_s for gap_s in itertools.chain.from_iterable(record.itls_s for record in done)]),
        **spread("e2el", [1e3 * record.e2el_s for record in done]),
        **spread("refusal", refused_ms),
        **spread("send_lag", [1e3 * (record.sent_s - record.scheduled_s) for record in counted]),
        "tokens_per_message": statistics.fmean([number for _, number in arrivals]) if arrivals else None,
    }
