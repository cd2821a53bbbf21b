"""The families of engines, one series a worker: sums over workers would fall when one goes, and rates would lie."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import Metric

from llama4_dist.engine.port import EngineStats
from llama4_dist.gateway.observe.dispatch_families import alone, dispatch_metrics
from llama4_dist.gateway.observe.family import Distribution, Family, counter, gauge, histogram
from llama4_dist.stations import BOUNDS_S, buckets

WORKER = "worker"

UP = gauge("engine_up", "Whether the engine answers.", WORKER)
ENGINES = gauge("engines", "Engines that answer.")
REPLAYED = counter("requests_replayed", "Requests that went on with another engine, by the one that was lost.", WORKER)

# Families of one number of `EngineStats`, named by its field.
NUMBERS: Mapping[str, Family] = {
    "requests_running": gauge("requests_running", "Sequences in the batch.", WORKER),
    "requests_waiting": gauge("requests_waiting", "Sequences that wait for admission.", WORKER),
    "steps_in_flight": gauge("steps_in_flight", "Steps begun whose tokens have not come.", WORKER),
    "max_queue_age_s": gauge("queue_age_seconds", "Age of the oldest request that waits.", WORKER),
    "kv_blocks_total": gauge("kv_blocks", "Blocks of the KV cache.", WORKER),
    "steps": counter("engine_steps", "Steps.", WORKER),
    "prompt_tokens": counter("prompt_tokens", "Prompt tokens of admitted requests.", WORKER),
    "generated_tokens": counter("generation_tokens", "Tokens sampled.", WORKER),
    "preemptions": counter("preemptions", "Sequences that lost their blocks to an older one.", WORKER),
    "prefix_hits": counter("prefix_cache_hits", "Admissions that found a part of their prompt in the cache.", WORKER),
    "prefix_tokens": counter("prefix_cache_tokens", "Prompt tokens they did not compute.", WORKER),
    "prefix_evictions": counter("prefix_cache_evictions", "Cached blocks needed for something else.", WORKER),
    "requests_admitted": counter("requests_admitted", "Requests taken in.", WORKER),
    "requests_finished": counter("requests_finished", "Requests that ended well.", WORKER),
    "requests_cancelled": counter("requests_cancelled", "Requests that were aborted.", WORKER),
    "requests_failed": counter("requests_failed", "Requests that ended with an error.", WORKER),
    "step_holds": counter("step_holds", "Times that steps stalled because no host served an expert.", WORKER),
    "step_held_s": counter("step_held_seconds", "Time they stalled, the stall of now included.", WORKER),
}
KV_USED = gauge("kv_cache_usage_ratio", "Share of KV blocks that sequences hold.", WORKER)
KV_CACHED = gauge("prefix_cache_usage_ratio", "Share of KV blocks kept for the prefixes in them.", WORKER)
STATIONS = histogram("station_seconds", "Time of a step at one of its stations.", BOUNDS_S, WORKER, "station")

ENGINE_FAMILIES = (UP, ENGINES, REPLAYED, *NUMBERS.values(), KV_USED, KV_CACHED, STATIONS)


def engine_metrics(answers: Mapping[str, EngineStats | None], replays: Mapping[str, int]) -> Iterator[Metric]:
    """Translate the counters of all engines; one that did not answer is down and has no others."""
    found = {worker: stats for worker, stats in answers.items() if stats is not None}
    yield UP.of(*(((worker,), float(worker in found)) for worker in answers))
    yield ENGINES.of(((), float(len(found))))
    yield REPLAYED.of(*(((worker,), replays.get(worker, 0)) for worker in {**answers, **replays}))
    for field, family in NUMBERS.items():
        yield family.of(*(((worker,), getattr(stats, field)) for worker, stats in found.items()))
    yield KV_USED.of(*(((worker,), share(s, s.kv_blocks_total - s.kv_blocks_free)) for worker, s in found.items()))
    yield KV_CACHED.of(*(((worker,), share(s, s.kv_blocks_cached)) for worker, s in found.items()))
    yield STATIONS.spread(_stations(found))
    yield from dispatch_metrics({alone(worker): stats for worker, stats in found.items()})


def share(stats: EngineStats, num_blocks: int) -> float:
    """Return a number of blocks as a share of all."""
    return num_blocks / stats.kv_blocks_total if stats.kv_blocks_total else 0.0


def _stations(found: Mapping[str, EngineStats]) -> Iterable[tuple[tuple[str, str], Distribution]]:
    for worker, stats in found.items():
        for station, seconds in stats.station_seconds.items():
            yield (worker, station), Distribution(counts=buckets(stats.station_steps, station), total=seconds)
