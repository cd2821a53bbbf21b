"""One attention group in simulated time: the engine's own scheduler and pace, without a model; reads no clock."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.page_allocator import PageAllocator
from llama4_dist.engine.plan import PlannedSpan
from llama4_dist.engine.scheduler import Scheduler
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.engine.step_times import StepTimes
from llama4_dist.model.kv_layout import KVLayout
from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.roofline import Work
from llama4_dist.request import EngineRequest, Sampling
from llama4_dist.simulator.load import Arrival

TOKEN = 0  # every token: no model looks at it


@dataclass(slots=True, eq=False)
class Running:
    """A request in a group, and when its tokens came."""

    arrival: Arrival
    sequence: SequenceState
    token_times_s: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Step:
    """A step under way; `ends_s` moves when hosts die meanwhile."""

    started_s: float
    ends_s: float
    spans: tuple[PlannedSpan, ...]
    num_decodes: int
    work: Work
    attention_busy: float = 0.0
    expert_busy: float = 0.0


class Group:
    """A scheduler with its pages and the sequences it has; the caller says how long a step takes."""

    def __init__(self, geometry: Geometry, layout: KVLayout, options: EngineOptions) -> None:
        assert options.num_blocks is not None, "a simulated group knows its pages"
        self.step: Step | None = None
        self._geometry = geometry
        self._options = options
        self._scheduler = Scheduler(PageAllocator(options.num_blocks), layout, options)
        self._times = StepTimes()
        self._by_id: dict[str, Running] = {}

    @property
    def num_live(self) -> int:
        return len(self._by_id)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    def add(self, number: int, arrival: Arrival) -> None:
        """Queue a request."""
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=(TOKEN,) * arrival.prompt_len,
            sampling=Sampling(max_tokens=arrival.output_len, ignore_eos=True),
        )
        sequence = SequenceState(
            request=request,
            seed=0,
            max_tokens=arrival.output_len,
            end_token_ids=frozenset(),
            order=(0, number),
            arrived_s=arrival.at_s,
            deadline_s=None,
            tokens=list(request.prompt_token_ids),
        )
        self._by_id[request.request_id] = Running(arrival, sequence)
        self._scheduler.add(sequence)

    def plan(self) -> tuple[tuple[PlannedSpan, ...], Work] | None:
        """Plan the next step as the engine does; None when there is nothing to compute."""
        most = self._times.prompt_tokens_beside_decodes(
            self._options.max_decode_slowdown, at_least=self._options.block_size
        )
        spans = self._scheduler.schedule(max_prompt_tokens=most).spans
        return (spans, self._work(spans)) if spans else None

    def finish(self, now_s: float) -> Iterator[Running]:
        """End the step: every sequence that has nothing pending gets a token; yield those that are done."""
        step = self.step
        assert step is not None, "a step that ends has begun"
        self.step = None
        num_prompt_tokens = sum(span.num_tokens for span in step.spans) - step.num_decodes
        self._times.note(
            num_decodes=step.num_decodes, num_prompt_tokens=num_prompt_tokens, seconds=now_s - step.started_s
        )
        for span in step.spans:
            sequence = span.sequence
            sequence.num_cached += span.num_tokens
            if sequence.num_pending:
                continue
            sequence.append(TOKEN)
            running = self._by_id[sequence.request_id]
            running.token_times_s.append(now_s)
            if sequence.num_output_tokens >= sequence.max_tokens:
                self._scheduler.remove(sequence)
                yield self._by_id.pop(sequence.request_id)

    def _work(self, spans: tuple[PlannedSpan, ...]) -> Work:
        """Tokens of a span share the keys they read; token i of it scores those before it, the half of n on average."""
        keys_read = keys_scored = 0.0
        for span in spans:
            cached = span.sequence.num_cached
            keys_read += self._geometry.keys_seen(cached + span.num_tokens)
            keys_scored += span.num_tokens * self._geometry.keys_seen(cached + (span.num_tokens + 1) / 2)
        return Work(
            rows=sum(span.num_tokens for span in spans),
            sequences=len(spans),
            keys_read=keys_read,
            keys_scored=keys_scored,
            logit_rows=sum(span.num_tokens == span.sequence.num_pending for span in spans),
        )
