"""What a simulated run gave: records as a load generator would note them, and a time line; pure sums."""

from dataclasses import dataclass, field
from typing import Any

from llama4_dist.bench.records import RequestRecord
from llama4_dist.bench.statistics import summarise

SCHEMA = "llama4_dist.simulation/1"


@dataclass(slots=True, kw_only=True)
class Bin:
    """A slice of the time line. Busy times are seconds of GPUs; queue and hosts are as they were at its last step."""

    tokens: int = 0
    attention_s: float = 0.0
    expert_s: float = 0.0
    waiting: int = 0
    running: int = 0
    hosts: int = 0


@dataclass(slots=True, kw_only=True)
class Timeline:
    """Equal slices of a run."""

    width_s: float
    bins: list[Bin] = field(default_factory=list)

    def at(self, now_s: float) -> Bin:
        """Return the slice of a time; those before it that nothing happened in are as the last was."""
        place = int(now_s / self.width_s)
        while len(self.bins) <= place:
            last = self.bins[-1] if self.bins else Bin()
            self.bins.append(Bin(waiting=last.waiting, running=last.running, hosts=last.hosts))
        return self.bins[place]

    def spend(self, start_s: float, end_s: float, attention: float, expert: float) -> None:
        """Count a step's busy shares of its group's and the fleet's GPUs over the slices it lies in."""
        begin_s = start_s
        while begin_s < end_s:
            until_s = min(end_s, (int(begin_s / self.width_s) + 1) * self.width_s)
            if until_s <= begin_s:  # the slice's edge, but for rounding
                until_s = min(end_s, begin_s + self.width_s)
            found = self.at(begin_s)
            found.attention_s += attention * (until_s - begin_s)
            found.expert_s += expert * (until_s - begin_s)
            begin_s = until_s


@dataclass(slots=True, kw_only=True)
class SimulationResult:
    """Records of all requests, the time line, and what happened when."""

    records: list[RequestRecord]
    timeline: Timeline
    happened: list[tuple[float, str]]
    num_groups: int
    num_unfinished: int
    num_preemptions: int
    num_steps: int

    def summary(self, duration_s: float) -> dict[str, object]:
        """Return latencies and rates under the names of vLLM's `bench serve`."""
        found = summarise(self.records, {}, until_s=duration_s)
        known = {name: value for name, value in found.items() if not name.endswith(("refusal_ms", "send_lag_ms"))}
        for name in ("goodput", "goodput_objectives_ms", "errors", "tokens_per_message"):
            known.pop(name, None)
        return {
            **known,
            "unfinished": self.num_unfinished,
            "preemptions": self.num_preemptions,
            "steps": self.num_steps,
            "attention_busy": sum(one.attention_s for one in self.timeline.bins) / duration_s / self.num_groups,
            "expert_busy": sum(one.expert_s for one in self.timeline.bins) / duration_s,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the time line as plain rows; shares are of all groups' GPUs."""
        width_s = self.timeline.width_s
        return [
            {
                "at_s": place * width_s,
                "tokens_per_s": one.tokens / width_s,
                "attention_busy": min(1.0, one.attention_s / (width_s * self.num_groups)),
                "expert_busy": min(1.0, one.expert_s / width_s),
                "waiting": one.waiting,
                "running": one.running,
                "hosts": one.hosts,
            }
            for place, one in enumerate(self.timeline.bins)
        ]
