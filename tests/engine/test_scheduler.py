from collections import Counter
from typing import Any

import hypothesis.strategies as st
from hypothesis import example, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama4_dist.engine.fair_share import FairShare
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.page_allocator import PageAllocator
from llama4_dist.engine.plan import StepPlan
from llama4_dist.engine.scheduler import Scheduler
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.model.kv_layout import KVGroup, KVLayout
from tests.engine.fake_model import LAYOUT
from tests.engine.sequences import sequence

CHUNKED = KVLayout(groups=(KVGroup(layers=(0,), chunk_size=None), KVGroup(layers=(1,), chunk_size=8)))


def make_scheduler(num_blocks: int, layout: KVLayout = LAYOUT, **options: Any) -> Scheduler:
    fields = {"block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16} | options
    return Scheduler(PageAllocator(num_blocks), layout, EngineOptions(**fields))


def compute(plan: StepPlan, scheduler: Scheduler | None = None) -> list[SequenceState]:
    """Do what the engine does with a plan, with a model that always says 7; return who got a token."""
    done = []
    for span in plan.spans:
        span.sequence.num_cached += span.num_tokens
        if span.sequence.num_pending == 0:
            span.sequence.append(7)
            done.append(span.sequence)
    if scheduler is not None:
        scheduler.keep_prefixes(plan.spans)
    return done


def spans(plan: StepPlan) -> list[tuple[str, int]]:
    return [(span.sequence.request_id, span.num_tokens) for span in plan.spans]


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler = make_scheduler(100)
    scheduler.add(sequence("a", (1, 2), arrival=0))
    assert spans(scheduler.schedule()) == [("a", 2)]
    compute_all = scheduler.running[0]
    compute_all.num_cached = 2
    compute_all.append(7)
    scheduler.add(sequence("b", tuple(range(40)), arrival=1))
    seen = []
    for _ in range(4):
        plan = scheduler.schedule()
        seen.append(spans(plan))
        compute(plan)
    # 16 tokens a step: one decode first, the rest is prefill.
    assert seen == [[("a", 1), ("b", 15)], [("a", 1), ("b", 15)], [("a", 1), ("b", 10)], [("a", 1), ("b", 1)]]


def test_requests_start_in_order_of_arrival_within_a_priority() -> None:
    scheduler = make_scheduler(100, max_num_seqs=3)
    for arrival, (name, priority) in enumerate([("a", 1), ("b", 0), ("c", 1), ("d", 0)]):
        scheduler.add(sequence(name, (1, 2), arrival=arrival, priority=priority))
    assert [name for name, _ in spans(scheduler.schedule())] == ["b", "d", "a"]
    assert [s.request_id for s in scheduler.waiting] == ["c"]


def test_a_short_prompt_does_not_overtake_one_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(sequence("a", (1,) * 8, arrival=0))
    compute(scheduler.schedule())
    scheduler.add(sequence("long", (1,) * 12, arrival=1))
    scheduler.add(sequence("short", (1,), arrival=2))
    plan = scheduler.schedule()
    assert [s.request_id for s in plan.admitted] == []
    scheduler.remove(scheduler.running[0])
    assert [s.request_id for s in scheduler.schedule().admitted] == ["long", "short"]


def test_the_youngest_is_preempted_when_blocks_run_out_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(sequence("old", (1,) * 7, arrival=0))
    scheduler.add(sequence("young", (2,) * 7, arrival=1))
    while not scheduler.num_preemptions:
        compute(scheduler.schedule())
        scheduler.check()
    (young,) = scheduler.waiting
    assert young.request_id == "young"
    assert (young.num_cached, young.pages, young.tokens) == (0, (), [2] * 7 + [7] * 2)
    assert [s.request_id for s in scheduler.running] == ["old"]


def test_prompt_logprobs_bound_the_rows_of_logits_of_a_step() -> None:
    scheduler = make_scheduler(100, max_logit_rows=5)
    for arrival, name in enumerate("ab"):
        scheduler.add(sequence(name, tuple(range(6)), arrival=arrival, prompt_logprobs=1))
    assert spans(scheduler.schedule()) == [("a", 5)]


def test_blocks_can_be_borrowed_at_the_cost_of_the_youngest() -> None:
    scheduler = make_scheduler(4)
    for arrival, name in enumerate("ab"):
        scheduler.add(sequence(name, (1,) * 7, arrival=arrival))
    compute(scheduler.schedule())
    scheduler.borrow("score", num_cached=0, end=5, num_known=5)
    scheduler.check()
    assert [s.request_id for s in scheduler.running] == ["a"]
    assert scheduler.schedule().admitted == ()
    scheduler.give_back("score")
    scheduler.give_back("score")
    assert [s.request_id for s in scheduler.schedule().admitted] == ["b"]
    scheduler.check()


def held(sequence_: SequenceState) -> list[tuple[int, int]]:
    """First and last + 1 block of each group."""
    return [(run.first_block, run.stop_block) for run in sequence_.pages]


def test_chunked_layers_give_their_pages_back_at_the_edge() -> None:
    scheduler = make_scheduler(100, CHUNKED, max_num_batched_tokens=6)
    scheduler.add(sequence("a", tuple(range(11)), arrival=0))
    seen = []
    for _ in range(8):
        plan = scheduler.schedule()
        seen.append((*spans(plan), *held(scheduler.running[0])))
        compute(plan)
        scheduler.check()
    # Blocks of 4, chunks of 8: [0, 6), [6, 11) over the edge with the pages of both chunks, then one by one.
    assert seen[:2] == [(("a", 6), (0, 3), (0, 2)), (("a", 5), (0, 3), (0, 3))]
    assert seen[2:] == [
        (("a", 1), (0, 3), (0, 3)),  # position 11 has room: what is behind the edge is let go with the next page
        *[(("a", 1), (0, 4), (2, 4))] * 4,
        (("a", 1), (0, 5), (4, 5)),
    ]
    assert scheduler.allocator.num_free == 100 - 6


def test_a_span_stops_at_the_edge_when_there_are_no_pages_for_both_chunks() -> None:
    scheduler = make_scheduler(7, CHUNKED, max_num_batched_tokens=16)
    scheduler.add(sequence("a", tuple(range(16)), arrival=0))
    seen = []
    for _ in range(2):
        plan = scheduler.schedule()
        seen.append((*spans(plan), *held(scheduler.running[0])))
        compute(plan)
        scheduler.check()
    assert seen == [(("a", 8), (0, 4), (0, 2)), (("a", 8), (0, 4), (2, 4))]
    assert scheduler.num_preemptions == 0


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of submit, step, abort, finish and borrow: no page is lost, every bound holds."""

    NUM_BLOCKS = 9
    LAYOUT = LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(
            self.NUM_BLOCKS, self.LAYOUT, max_num_seqs=3, max_num_batched_tokens=8, max_logit_rows=3
        )
        self.arrivals = 0
        self.borrowed: list[str] = []

    @rule(
        length=st.integers(1, 20),
        num_outputs=st.integers(1, 12),
        priority=st.integers(0, 1),
        logprobs=st.sampled_from([None, 0]),
        tenant=st.sampled_from("xy"),
        odd_one=st.integers(0, 19),
    )
    def submit(
        self, length: int, num_outputs: int, priority: int, logprobs: int | None, tenant: str, odd_one: int
    ) -> None:
        made = sequence(
            f"r{self.arrivals}",
            tuple(int(position == odd_one) for position in range(length)),  # prompts begin alike, and fork somewhere
            arrival=self.arrivals,
            priority=priority,
            prompt_logprobs=logprobs,
            tenant=tenant,
        )
        made.max_tokens = num_outputs  # at most 32 tokens: any sequence fits the empty cache of 36
        self.scheduler.add(made)
        self.arrivals += 1

    @rule()
    def step(self) -> None:
        before = {s.request_id: len(s.tokens) + s.num_cached for s in self.scheduler.running}
        oldest = min(self.scheduler.live(), key=lambda s: s.order, default=None)
        plan = self.scheduler.schedule()
        assert not (plan.preempted and plan.admitted), "an admission took back what a preemption had freed"
        assert sum(span.num_tokens for span in plan.spans) <= 8
        assert all(span.num_tokens >= 1 for span in plan.spans)
        assert sum(span.num_tokens for span in plan.spans if span.sequence.wants_prompt_logprobs) <= 3
        for span in plan.spans:
            end = span.sequence.num_cached + span.num_tokens
            for group, run in zip(self.LAYOUT.groups, span.sequence.pages, strict=True):
                assert run.first_block * 4 <= group.first_key(span.sequence.num_cached) < end <= run.stop_block * 4
        if oldest is not None and not self.borrowed:
            advanced = [span.sequence for span in plan.spans]
            was_running = oldest in self.scheduler.running and before
            others = [s for s in advanced if s.request.tenant != oldest.request.tenant and s.num_pending > 1]
            assert oldest in advanced or not was_running or others, "the oldest starved"
            if was_running and oldest.num_pending > 1 and oldest not in advanced:
                served = self.scheduler.shares.served
                assert min(served(s.request.tenant) for s in others) <= served(oldest.request.tenant) + 8
            assert advanced, "work is waiting and nothing runs"
        for sequence_ in compute(plan, self.scheduler):
            sequence_.prompt_logprobs = [None] * sequence_.num_prompt_tokens
            if sequence_.num_output_tokens >= sequence_.max_tokens:
                self.scheduler.remove(sequence_)

    @precondition(lambda self: self.scheduler.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.remove(data.draw(st.sampled_from(self.scheduler.live())))

    @precondition(lambda self: not self.borrowed)
    @rule(count=st.integers(1, 9))
    def borrow(self, count: int) -> None:
        (run, *_) = self.scheduler.borrow("score", num_cached=0, end=1, num_known=count * 4)
        assert len(run.ids) == count
        self.borrowed.append("score")

    @rule()
    def distrust(self) -> None:
        self.scheduler.forget_prefixes()
        assert self.scheduler.allocator.num_idle == 0

    @precondition(lambda self: self.borrowed)
    @rule()
    def give_back(self) -> None:
        self.scheduler.give_back(self.borrowed.pop())

    @invariant()
    def blocks_are_conserved_and_bounds_hold(self) -> None:
        self.scheduler.check()
        assert len(self.scheduler.running) <= 3
        orders = [s.order for s in self.scheduler.running]
        assert orders == sorted(orders)

    def teardown(self) -> None:
        """Left alone, everything ends and every block is free again."""
        while self.borrowed:
            self.scheduler.give_back(self.borrowed.pop())
        for _ in range(2000):
            if not self.scheduler.live():
                break
            self.step()
        assert not self.scheduler.live()
        assert self.scheduler.allocator.num_free == self.NUM_BLOCKS


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestScheduler = SchedulerMachine.TestCase


def test_tenants_take_turns_by_what_they_were_served() -> None:
    """A tenant with five long prompts does not keep another one's short prompt waiting."""
    scheduler = make_scheduler(1000, max_num_seqs=8, max_num_batched_tokens=10)
    for index in range(5):
        scheduler.add(sequence(f"many{index}", (1,) * 50, arrival=index, tenant="many"))
    seen = [spans(scheduler.schedule())]
    compute(scheduler.schedule())
    scheduler.add(sequence("one", (2,) * 12, arrival=9, tenant="one"))
    for _ in range(4):
        plan = scheduler.schedule()
        seen.append(spans(plan))
        compute(plan)
    # The newcomer starts at the least of the active ones' counters, level with "many": the older request goes first
    # once, then both are served in turn; without turns "one" would wait for 250 tokens.
    assert [name for step in seen[1:] for name, _ in step][:2] == ["many0", "one"]
    assert sum(count for step in seen[1:3] for name, count in step if name == "one") == 10


def test_a_pause_earns_no_credit_and_whoever_is_gone_is_forgotten() -> None:
    shares = FairShare()
    shares.enter("a")
    shares.charge("a", 100)
    shares.enter("b")
    assert shares.served("b") == 100
    shares.charge("b", 50)
    shares.leave("b")
    shares.charge("a", 10)
    shares.enter("b")
    assert shares.served("b") == 150, "what it was served above the others stays on its account"
    shares.leave("b")
    shares.charge("a", 100)
    shares.enter("b")
    assert shares.served("b") == 210
    shares.leave("a")
    shares.leave("b")
    assert (shares.served("a"), shares.served("b")) == (0, 0)


@example([("a", 30)] * 10 + [("b", 30)])  # in the order of arrival "b" would wait for 300 tokens
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), min_size=3, max_size=60))
def test_no_tenant_that_waits_is_served_less_than_another_by_more_than_a_step(arrivals: list[tuple[str, int]]) -> None:
    """While all of them wait for prompts to be computed, as in VTC's theorem on backlogged clients."""
    scheduler = make_scheduler(10_000, max_num_seqs=64, max_num_batched_tokens=64)
    for arrival, (tenant, length) in enumerate(arrivals):
        scheduler.add(sequence(f"r{arrival}", (arrival % 90,) * length, arrival=arrival, tenant=tenant))
    tokens_of: Counter[str] = Counter()
    waiting_at_first = {s.request.tenant for s in scheduler.waiting}
    while waiting_at_first <= {s.request.tenant for s in scheduler.live() if s.num_pending > 1}:
        plan = scheduler.schedule()
        for span in plan.spans:
            tokens_of[span.sequence.request.tenant] += span.num_tokens
        for ended in compute(plan):
            scheduler.remove(ended)
    assert max(tokens_of.values(), default=0) - min((tokens_of[t] for t in waiting_at_first), default=0) <= 2 * 64


def test_beside_decodes_a_long_prompt_gets_what_it_may_and_alone_all() -> None:
    scheduler = make_scheduler(100)
    scheduler.add(sequence("a", (1, 2), arrival=0))
    compute(scheduler.schedule(max_prompt_tokens=5))
    scheduler.add(sequence("b", tuple(range(40)), arrival=1))
    assert spans(scheduler.schedule(max_prompt_tokens=5)) == [("a", 1), ("b", 5)]
    scheduler.remove(scheduler.get("a"))  # type: ignore[arg-type]
    assert spans(scheduler.schedule(max_prompt_tokens=5)) == [("b", 16)]


class ChunkedSchedulerMachine(SchedulerMachine):
    """The same where one group of layers keeps chunks of 8."""

    NUM_BLOCKS = 11
    LAYOUT = CHUNKED


ChunkedSchedulerMachine.TestCase.settings = SchedulerMachine.TestCase.settings
TestChunkedScheduler = ChunkedSchedulerMachine.TestCase
