"""The event loop: arrivals, steps, deaths and changes of size, in order of simulated time; the same seed, the same run.

A step takes what `planner.step` says of its work. Groups reach a layer together, so an expert's rows are those of all
groups that step. A group's rows on a host that dies are sent to another copy after `detect_s`; if there is none, all
groups wait until living hosts have read the lost slices.
"""

import heapq
from collections.abc import Callable, Sequence
from itertools import count

from llama4_dist.bench.records import RequestRecord
from llama4_dist.engine.options import EngineOptions
from llama4_dist.model.kv_layout import layout_of
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.memory import num_kv_blocks
from llama4_dist.planner.multinomial import Slowest
from llama4_dist.planner.plan import Plan
from llama4_dist.planner.request import PlanRequest
from llama4_dist.planner.roofline import Work, slice_cost
from llama4_dist.planner.step import StepTimes, step_of
from llama4_dist.simulator.fleet import Fleet
from llama4_dist.simulator.group import Group, Running, Step
from llama4_dist.simulator.load import Arrival
from llama4_dist.simulator.result import SimulationResult, Timeline
from llama4_dist.simulator.scenario import Event, Scenario
from llama4_dist.simulator.weights import read_s, slices_that_fit

BLOCK_SIZE = 128  # positions of a page: only counts matter here, so pages are larger than an engine's
NUM_BINS = 120
Progress = Callable[[float], None]


def simulate(
    request: PlanRequest,
    plan: Plan,
    arrivals: Sequence[Arrival],
    scenario: Scenario,
    *,
    max_num_batched_tokens: int = 2048,
    on_progress: Progress = lambda now_s: None,
) -> SimulationResult:
    """Serve `arrivals` for `scenario.duration_s`; what is unfinished then is counted and otherwise forgotten."""
    return _Run(request, plan, scenario, max_num_batched_tokens, on_progress).serve(arrivals)


def options_of(request: PlanRequest, plan: Plan, max_num_batched_tokens: int) -> EngineOptions:
    """Return a group's engine settings: the plan's batch, and the pages that its memory holds."""
    return EngineOptions(
        max_num_seqs=plan.layout.sequences,
        max_num_batched_tokens=max(max_num_batched_tokens, plan.layout.sequences),
        block_size=BLOCK_SIZE,
        num_blocks=max(1, num_kv_blocks(request.geometry, plan.layout, plan.memory, block_size=BLOCK_SIZE)),
        enable_prefix_caching=False,
    )


class _Run:
    """One simulation; every event is (time, number, what to do)."""

    def __init__(
        self, request: PlanRequest, plan: Plan, scenario: Scenario, max_num_batched_tokens: int, on_progress: Progress
    ) -> None:
        self._request = request
        self._layout: Layout = plan.layout
        self._scenario = scenario
        self._rates = request.rates(plan.layout)
        self._on_progress = on_progress
        options = options_of(request, plan, max_num_batched_tokens)
        kv_layout = layout_of(request.geometry.config)
        self._groups = [Group(request.geometry, kv_layout, options) for _ in range(plan.layout.groups)]
        self._fleet = Fleet(
            request.traffic.popularity,
            plan.layout.slices,
            plan.layout.replicas,
            slice_cost(request.geometry, plan.layout, self._rates, reads=_reads(request, plan.layout)),
            plan.layout.hosts,
            slices_that_fit(self._request, self._layout),
        )
        self._held_until_s = 0.0  # nobody steps before: an expert has no holder
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._now_s = 0.0
        self._result = SimulationResult(
            records=[],
            timeline=Timeline(width_s=scenario.duration_s / NUM_BINS),
            happened=[],
            num_groups=plan.layout.groups,
            num_unfinished=0,
            num_preemptions=0,
            num_steps=0,
        )

    def serve(self, arrivals: Sequence[Arrival]) -> SimulationResult:
        for number, arrival in enumerate(arrivals):
            self._at(arrival.at_s, lambda number=number, arrival=arrival: self._arrive(number, arrival))  # type: ignore[misc]
        for event in self._scenario.events:
            self._at(event.at_s, lambda event=event: self._happen(event))  # type: ignore[misc]
        while self._events and self._events[0][0] <= self._scenario.duration_s:
            self._now_s, _, act = heapq.heappop(self._events)
            act()
        self._result.num_unfinished = sum(group.num_live for group in self._groups)
        self._result.num_preemptions = sum(group.num_preemptions for group in self._groups)
        return self._result

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), act))

    def _arrive(self, number: int, arrival: Arrival) -> None:
        """Give a request to the group with the fewest, as gateways do."""
        group = min(self._groups, key=lambda group: group.num_live)
        group.add(number, arrival)
        if group.step is None:
            self._begin(group)

    def _begin(self, group: Group) -> None:
        planned = group.plan()
        if planned is None:
            return
        spans, work = planned
        starts_s = max(self._now_s, self._held_until_s)
        times = self._times(group, work)
        group.step = Step(
            started_s=starts_s,
            ends_s=starts_s + times.step_s,
            spans=spans,
            num_decodes=sum(span.sequence.num_pending == 1 for span in spans),
            work=work,
            attention_busy=times.attention_busy,
            expert_busy=times.expert_busy,
        )
        self._at(group.step.ends_s, lambda: self._end(group))

    def _times(self, group: Group, work: Work) -> StepTimes:
        """Time a step of one group while the others' rows are at the hosts too."""
        parts = self._layout.stages * self._layout.microbatches
        others = sum(-(-one.step.work.rows // parts) for one in self._groups if one is not group and one.step)

        def load(rows: int) -> Slowest:
            return self._fleet.load((rows + others) * self._request.geometry.config.experts_per_token)

        return step_of(self._request.geometry, self._layout, self._rates, work, load)

    def _end(self, group: Group) -> None:
        step = group.step
        assert step is not None, "an end without a step"
        if step.ends_s > self._now_s:  # a host died meanwhile
            self._at(step.ends_s, lambda: self._end(group))
            return
        busy = step.expert_busy / max(1, sum(one.step is not None for one in self._groups))
        self._result.timeline.spend(step.started_s, step.ends_s, step.attention_busy, busy)
        self._result.num_steps += 1
        for done in group.finish(self._now_s):
            self._result.records.append(_record(done))
        self._note(step.work.logit_rows)
        self._on_progress(self._now_s)
        self._begin(group)

    def _note(self, tokens: int) -> None:
        found = self._result.timeline.at(self._now_s)
        found.tokens += tokens
        found.waiting = sum(group.num_waiting for group in self._groups)
        found.running = sum(group.num_running for group in self._groups)
        found.hosts = self._fleet.num_alive

    def _happen(self, event: Event) -> None:
        if event.kind == "kill":
            self._kill(event.value)
        else:
            self._scale(event.value)

    def _kill(self, host: int) -> None:
        if host >= self._fleet.num_hosts or host in self._fleet.dead:
            self._tell(f"host {host} is not there to die")
            return
        return_s = self._scenario.respawn_s + self._reload_s(self._fleet.held_by(host))
        lost = self._fleet.kill(host)
        delay_s = self._scenario.detect_s
        self._tell(f"host {host} dies; {len(lost)} slices of a layer had no other copy")
        if lost:
            delay_s += self._rescue(len(lost), return_s)
            self._held_until_s = max(self._held_until_s, self._now_s + delay_s)
        for group in self._groups:
            if group.step is not None:
                group.step.ends_s += delay_s
        self._at(self._now_s + return_s, lambda: self._revive(host))

    def _rescue(self, num_lost: int, return_s: float) -> float:
        """Let living hosts take in what is lost; return how long rows wait for it."""
        if homeless := self._fleet.adopt():
            self._tell(f"{len(homeless)} slices of a layer fit no living host: all wait for its successor")
            return return_s
        # They read the lost slices side by side.
        return self._reload_s(-(-num_lost // self._fleet.num_alive))

    def _revive(self, host: int) -> None:
        if host < self._fleet.num_hosts:
            self._fleet.revive(host)
            self._tell(f"host {host} serves again")

    def _scale(self, num_hosts: int) -> None:
        """Start processes if there are to be more; switch when they have read what moves. Serving goes on."""
        units = len(self._request.traffic.popularity) * self._layout.slices * self._layout.replicas
        least = self._layout.slices * self._layout.replicas
        if not least <= num_hosts <= units:
            self._tell(f"{num_hosts} hosts are refused: there must be from {least} to {units}")
            return
        if -(-units // num_hosts) > slices_that_fit(self._request, self._layout):
            self._tell(f"{num_hosts} hosts are refused: their memory does not hold all slices")
            return
        start_s = self._scenario.respawn_s if num_hosts > self._fleet.num_hosts else 0.0
        moved = -(-units // num_hosts)
        self._tell(f"scaling to {num_hosts} hosts begins")
        self._at(self._now_s + start_s + self._reload_s(moved), lambda: self._resize(num_hosts))

    def _resize(self, num_hosts: int) -> None:
        moved = self._fleet.resize(num_hosts)
        self._tell(f"{num_hosts} hosts serve; {moved} slices of a layer moved")

    def _reload_s(self, slices: int) -> float:
        return read_s(self._request, self._layout, slices, self._scenario.source)

    def _tell(self, text: str) -> None:
        self._result.happened.append((self._now_s, text))
        self._result.timeline.at(self._now_s).hosts = self._fleet.num_alive


def _reads(request: PlanRequest, layout: Layout) -> int:
    """How often a host reads an expert for one step of all groups."""
    return 1 if request.traffic.pooled else layout.groups


def _record(done: Running) -> RequestRecord:
    return RequestRecord(
        scheduled_s=done.arrival.at_s,
        sent_s=done.arrival.at_s,
        ended_s=done.token_times_s[-1],
        prompt_tokens=done.arrival.prompt_len,
        tokens=tuple((at_s, 1) for at_s in done.token_times_s),
    )
