"""Plans an open loop: when each request is sent and what it asks; pure, the same seed gives the same plan."""

import itertools
import math
import random
from collections.abc import Iterator

from llama4_dist.bench.records import PlannedRequest, wrong


def send_times(rate: float, number: int, *, seed: int, burstiness: float = 1.0) -> list[float]:
    """Return `number` send times in seconds from 0 on at `rate` a second; an infinite rate sends all at once.

    Gaps follow a gamma distribution of shape `burstiness` and mean 1/rate, as in vLLM's `bench serve`: 1 is a Poisson
    process, smaller comes in bursts, infinite is evenly spaced.
    """
    if not rate > 0:
        raise wrong("rate", f"{rate} requests a second: give more than 0, or inf for all at once")
    if not burstiness > 0:
        raise wrong("burstiness", f"{burstiness}: give more than 0; 1 is Poisson, inf is evenly spaced")
    if math.isinf(rate):
        return [0.0] * number
    return list(itertools.islice(itertools.accumulate(_gaps(rate, burstiness, seed), initial=0.0), number))


def _gaps(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    if math.isinf(burstiness):
        return itertools.repeat(1.0 / rate)
    draw = random.Random(seed)  # noqa: S311 (a load, no secret)
    return (draw.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in itertools.count())


def plan(
    times_s: list[float], *, input_len: int, output_len: int, vocab_size: int, seed: int
) -> tuple[PlannedRequest, ...]:
    """Return requests of random token ids; no two share a prefix but by chance."""
    for field, value in (("input_len", input_len), ("output_len", output_len)):
        if value < 1:
            raise wrong(field, f"{value}: give at least 1 token")
    draw = random.Random(seed)  # noqa: S311 (a load, no secret)
    return tuple(
        PlannedRequest(
            at_s=at_s,
            prompt_token_ids=tuple(draw.choices(range(vocab_size), k=input_len)),
            output_len=output_len,
        )
        for at_s in times_s
    )


def shares(requests: tuple[PlannedRequest, ...], number: int) -> list[tuple[PlannedRequest, ...]]:
    """Deal a plan out to `number` client processes; each keeps the times of its own."""
    return [requests[first::number] for first in range(number)]
