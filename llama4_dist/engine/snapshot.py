"""Builds `EngineStats` from a core that another thread may be stepping; reads single values, takes no lock."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.port import EngineStats


def snapshot(core: EngineCore) -> EngineStats:
    """Return the counters of now; values read while a step runs may be one step apart."""
    counters, scheduler = core.counters, core.scheduler
    waiting = tuple(scheduler.waiting)
    now_s = core.clock()
    held_since_s = core.held_since_s
    queue_ages_s = (now_s - s.arrived_s for s in waiting if s.queue_s is None)  # a preempted one has been admitted
    return EngineStats(
        requests_running=len(scheduler.running),
        requests_waiting=len(waiting),
        steps_in_flight=core.flight.num_steps,
        kv_blocks_total=scheduler.allocator.num_pages,
        kv_blocks_free=scheduler.allocator.num_free,
        kv_blocks_cached=scheduler.allocator.num_idle,
        steps=counters.steps,
        prompt_tokens=counters.prompt_tokens,
        generated_tokens=counters.generated_tokens,
        preemptions=scheduler.num_preemptions,
        prefix_hits=scheduler.num_prefix_hits,
        prefix_tokens=scheduler.num_prefix_tokens,
        prefix_evictions=scheduler.allocator.num_evictions,
        requests_admitted=counters.admitted,
        requests_finished=counters.finished,
        requests_cancelled=counters.cancelled,
        requests_failed=counters.failed,
        max_queue_age_s=max(queue_ages_s, default=0.0),
        step_holds=counters.holds,
        step_held_s=counters.held_s + (now_s - held_since_s if held_since_s is not None else 0.0),
        station_seconds=counters.stations.seconds(),
        station_steps=counters.stations.steps(),
        **core.runner.dispatcher.stats().told(),
    )


def add_stats(parts: Sequence[EngineStats]) -> EngineStats:
    """Return the sums over several engines; of the queue age, the largest."""
    total: dict[str, Any] = {}
    for field in fields(EngineStats):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "max_queue_age_s":
            total[field.name] = max(values)
        elif field.name == "host_transports":  # of workers that reach a host in several ways, the last one's
            total[field.name] = {host: way for value in values for host, way in value.items()}
        elif isinstance(values[0], (int, float)):
            total[field.name] = sum(values)
        else:
            total[field.name] = dict(sum(map(Counter, values), Counter()))
    return EngineStats(**total)
