"""Drives an engine of this process without a gateway: batches one after the other, or all prompts at once."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llama4_dist.bench.records import PlannedRequest
from llama4_dist.bench.statistics import percentile, spread
from llama4_dist.engine.port import Engine, EngineStats, is_last
from llama4_dist.errors import EngineError
from llama4_dist.request import EngineRequest, Sampling, TokenOutput

OnDone = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What came of requests that were submitted together: when each step's tokens came, in seconds from submission."""

    steps: tuple[tuple[float, int], ...]  # (arrival, tokens)
    seconds: float

    @property
    def gaps_s(self) -> list[float]:
        """Times between steps; the first, which holds the prompts, is left out."""
        return [after - before for (before, _), (after, _) in zip(self.steps, self.steps[1:], strict=False)]


class BatchRunner:
    """Submits requests to an engine and waits; one batch at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: list[tuple[float, int]] = []
        self._unfinished: set[str] = set()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._num_batches = 0
        engine.start(self._take)

    def run(self, requests: Sequence[PlannedRequest], on_done: OnDone = lambda number: None) -> Batch:
        """Submit all at once, greedy and with end tokens ignored; raise the first request's error if one fails."""
        self._num_batches += 1
        made = {
            f"bench-{self._num_batches}/{number}": EngineRequest(
                request_id=f"bench-{self._num_batches}/{number}",
                prompt_token_ids=request.prompt_token_ids,
                sampling=Sampling(temperature=0.0, max_tokens=request.output_len, ignore_eos=True, seed=number),
            )
            for number, request in enumerate(requests)
        }
        with self._changed:
            self._steps, self._unfinished, self._error = [], set(made), None
        started_s = time.perf_counter()
        for request in made.values():
            self._engine.submit(request)
        with self._changed:
            while self._unfinished and self._error is None:
                on_done(len(made) - len(self._unfinished))
                self._changed.wait(0.2)
            steps, error = tuple(self._steps), self._error
        on_done(len(made))
        if error is not None:
            raise error
        if not steps:
            raise EngineError("the engine ended every request without a token")
        return Batch(
            steps=tuple((at_s - started_s, number) for at_s, number in steps), seconds=steps[-1][0] - started_s
        )

    def _take(self, outputs: Sequence[TokenOutput]) -> None:
        now_s = time.perf_counter()
        with self._changed:
            self._steps.append((now_s, sum(len(output.token_ids) for output in outputs)))
            for output in outputs:
                self._error = self._error or output.error
                if is_last(output):
                    self._unfinished.discard(output.request_id)
            if not self._unfinished or self._error is not None:
                self._changed.notify_all()


def latency_figures(batches: Sequence[Batch]) -> dict[str, object]:
    """Return the figures of several equal batches; `latency` is a whole batch, as in vLLM's `bench latency`."""
    totals_ms = [1e3 * batch.seconds for batch in batches]
    return {
        "avg_latency_ms": statistics.fmean(totals_ms),
        **{f"p{percent}_latency_ms": percentile(totals_ms, percent) for percent in (50, 90, 99)},
        **spread("ttft", [1e3 * batch.steps[0][0] for batch in batches]),
        **spread("step", [1e3 * gap_s for batch in batches for gap_s in batch.gaps_s]),
        "output_throughput": sum(number for batch in batches for _, number in batch.steps)
        / sum(batch.seconds for batch in batches),
    }


def throughput_figures(batch: Batch, requests: Sequence[PlannedRequest]) -> dict[str, object]:
    """Return requests and tokens a second of one run of all prompts."""
    num_input = sum(len(request.prompt_token_ids) for request in requests)
    num_output = sum(number for _, number in batch.steps)
    return {
        "elapsed_time": batch.seconds,
        "num_requests": len(requests),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "requests_per_second": len(requests) / batch.seconds,
        "output_throughput": num_output / batch.seconds,
        "total_token_throughput": (num_input + num_output) / batch.seconds,
    }


def profile(before: EngineStats, after: EngineStats, wall_s: float) -> list[Mapping[str, object]]:
    """Return, per station, its seconds between two readings, its share of the wall time and its mean per step.

    What is left of the wall time, `idle`, lies between steps: handing tokens out and taking commands in.
    """
    num_steps = max(1, after.steps - before.steps)
    seconds = {
        name: total_s - before.station_seconds.get(name, 0.0)
        for name, total_s in after.station_seconds.items()
        if name != "model"  # the sum of those inside it
    }
    seconds["idle"] = max(0.0, wall_s - sum(seconds.values()))
    return [
        {"station": name, "seconds": spent_s, "share": spent_s / wall_s, "ms_per_step": 1e3 * spent_s / num_steps}
        for name, spent_s in seconds.items()
    ]
