"""The port through which every face speaks to an engine; knows neither threads, nor torch modules, nor transports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from llama4_dist.dispatch.stats import DispatchCounters
from llama4_dist.errors import NotFoundError, UnavailableError
from llama4_dist.request import EngineLimits, EngineRequest, TokenOutput

LOCAL = "local"  # the worker whose engine is in the gateway's own process

OnOutputs = Callable[[Sequence[TokenOutput]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats(DispatchCounters):
    """Gauges and counters since the engine was built; `admitted = finished + cancelled + failed + live`.

    `station_seconds` sums wall time per station of a step, and `station_steps` counts steps by the time they spent
    there, by bucket; names and buckets are those of `llama4_dist.stations`.
    `steps_in_flight` have begun and their tokens have not come: one at most, or as many as a group has stages.
    `requests_replayed` counts the times a group gave a request to another engine because its own was lost.
    `kv_blocks_cached` are free pages kept for the prefixes in them; `prefix_hits` admissions that found some,
    `prefix_tokens` the positions they did not compute, `prefix_evictions` cached pages that were needed for something
    else.

    `step_holds` counts the times that steps waited for an expert nobody served, `step_held_s` how long, the wait of now
    included.
    """

    requests_running: int = 0
    requests_waiting: int = 0
    steps_in_flight: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    prefix_evictions: int = 0
    requests_admitted: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    requests_failed: int = 0
    requests_replayed: int = 0
    step_holds: int = 0
    step_held_s: float = 0.0
    max_queue_age_s: float = 0.0
    station_seconds: Mapping[str, float] = field(default_factory=dict)
    station_steps: Mapping[str, int] = field(default_factory=dict)


def is_last(output: TokenOutput) -> bool:
    """Return whether no further output follows for this request."""
    return output.finish_reason is not None or output.error is not None


def unknown_request() -> NotFoundError:
    """Build the one answer to an attach that finds nothing, whatever the cause: it tells nobody what runs elsewhere."""
    return NotFoundError("no such request waits to be resumed: start it again")


class Engine(Protocol):
    """Something that turns `EngineRequest`s into a stream of `TokenOutput`s; all methods are thread-safe."""

    @property
    def limits(self) -> EngineLimits: ...

    def start(self, on_outputs: OnOutputs) -> None:
        """Begin to serve; `on_outputs` is called at most once per step, from the engine's own thread."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises OverloadedError, DuplicateRequestError, UnavailableError."""

    def attach(self, request: EngineRequest) -> None:
        """Take over a request that runs without an owner: its outputs follow from the first token on.

        NotFoundError, as an output, where there is none of that id and digest. Raises as `submit` does.
        """

    def abort(self, request_id: str) -> None:
        """Cancel a request; idempotent. Its KV is free within one step and a CANCELLED output follows."""

    def score(self, token_ids: Sequence[int], *, chunk_size: int | None = None) -> Tensor:
        """Return float32 logits_TV of every position. chunk_size=1 takes the decode path."""

    def stats(self) -> EngineStats:
        """Return the counters of now."""

    def close(self) -> None:
        """Stop; what still runs ends with UnavailableError (reason DRAINING)."""


@runtime_checkable
class EngineOfMany(Protocol):
    """An engine over several, each a worker of its own."""

    def stats_by_worker(self) -> Mapping[str, EngineStats | None]:
        """Return each worker's counters; None for one that does not answer."""

    def replays(self) -> Mapping[str, int]:
        """Return how many requests went on elsewhere, by the worker that was lost; it may be gone for good."""


def stats_by_worker(engine: Engine) -> Mapping[str, EngineStats | None]:
    """Return the counters of each engine behind a port; one that is alone is called "local"."""
    if isinstance(engine, EngineOfMany):
        return engine.stats_by_worker()
    try:
        return {LOCAL: engine.stats()}
    except UnavailableError:
        return {LOCAL: None}
