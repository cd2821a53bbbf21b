"""Any interleaving of requests, aborts, deadlines and faults: none is lost, doubled or given wrong tokens."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama4_dist.engine import scorer
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.port import is_last
from llama4_dist.errors import DeadlineExceededError, EngineError, UnavailableError
from llama4_dist.model.batch import Batch
from llama4_dist.model.kv_layout import KVGroup, KVLayout
from llama4_dist.request import FinishReason, TokenOutput
from tests.engine.fake_model import EOS, LAYOUT, FakeModel, fake_core, greedy
from tests.engine.sequences import request

POISON = EOS  # a token the model never says itself


class EngineMachine(RuleBasedStateMachine):
    """A core of 40 cache positions, 3 sequences and 10 tokens a step, under everything that may happen to it."""

    NUM_BLOCKS = 10
    LAYOUT = LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.models: list[FakeModel] = []  # whose faults are those of a step
        self.core = self.new_core(
            num_blocks=self.NUM_BLOCKS,
            layout=self.LAYOUT,
            max_context=40,
            max_num_seqs=3,
            max_num_batched_tokens=10,
            max_logit_rows=4,
            clock=lambda: self.now_s,
        )
        self.before_each_part(self.refuse_poison)
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.max_tokens: dict[str, int] = {}
        self.outputs: dict[str, list[TokenOutput]] = {}

    def new_core(self, **options: Any) -> EngineCore:
        core = fake_core(**options)
        assert isinstance(core.runner.model, FakeModel)
        self.models = [core.runner.model]
        return core

    def before_each_part(self, act: Callable[[Batch], None]) -> None:
        for model in self.models:
            model.before_forward = act

    def refuse_poison(self, batch: Batch) -> None:
        if (batch.token_ids_T == POISON).any():
            raise EngineError("poison")

    def take(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            seen = self.outputs[output.request_id]
            assert not (seen and is_last(seen[-1])), "an output follows the last"
            seen.append(output)

    def live(self) -> list[str]:
        return [name for name, outputs in self.outputs.items() if not (outputs and is_last(outputs[-1]))]

    @rule(
        prompt=st.one_of(
            st.lists(st.integers(0, 40), min_size=1, max_size=16),
            st.integers(1, 16).map(lambda length: list(range(length))),  # these share what they begin with
        ),
        max_tokens=st.integers(1, 20),
        fields=st.fixed_dictionaries(
            {},
            optional={
                "priority": st.integers(0, 1),
                "timeout_s": st.integers(1, 9).map(float),
                "prompt_logprobs": st.just(0),
                "logprobs": st.just(1),
                "tenant": st.sampled_from("xy"),
            },
        ),
        poisoned=st.sampled_from([False] * 7 + [True]),
    )
    def submit(self, prompt: list[int], max_tokens: int, fields: dict[str, Any], poisoned: bool) -> None:
        name = f"r{len(self.prompts)}"
        self.prompts[name] = (*prompt, *([POISON] if poisoned else []))
        self.max_tokens[name] = max_tokens
        self.outputs[name] = []
        self.take(self.core.add(request(name, self.prompts[name], max_tokens=max_tokens, **fields)))

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.now_s += 0.25
            self.take(self.core.step())
            late = [s for s in self.core.scheduler.live() if s.deadline_s is not None and s.deadline_s <= self.now_s]
            assert late == [], "a request outlived its deadline by a step"

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.live()))
        (output,) = self.core.abort(name)
        assert output.finish_reason is FinishReason.CANCELLED
        self.take([output])
        assert self.core.abort(name) == []

    @rule()
    def lose_an_expert_for_one_step(self) -> None:
        def unreachable(batch: Batch) -> None:
            raise UnavailableError("no live replica", reason="EXPERT_UNREACHABLE")

        self.before_each_part(unreachable)
        outputs = self.core.step()
        # Steps that were in flight may have been computed before.
        assert self.core.flight.depth > 1 or all(isinstance(output.error, DeadlineExceededError) for output in outputs)
        self.take(outputs)
        self.before_each_part(self.refuse_poison)

    @rule(length=st.integers(1, 40), chunk_size=st.sampled_from([None, 1]))
    def score(self, length: int, chunk_size: int | None) -> None:
        text = tuple(range(length))
        job = scorer.make_job(self.core, "score", text, chunk_size)
        while not job.done:
            scorer.advance(self.core, job)
            self.take(self.core.step())
        self.core.scheduler.give_back("score")
        best = [row_V.argmax().item() for part_TV in job.parts for row_V in part_TV]
        assert best == [greedy(text[: i + 1], 1)[0] for i in range(length)]

    @invariant()
    def everything_adds_up(self) -> None:
        self.core.scheduler.check()
        c = self.core.counters
        assert c.admitted == len(self.prompts) == c.finished + c.cancelled + c.failed + len(self.live())
        assert {s.request_id for s in self.core.scheduler.live()} == set(self.live())

    @invariant()
    def every_stream_is_a_prefix_of_the_truth(self) -> None:
        for name, outputs in self.outputs.items():
            got = [token_id for output in outputs for token_id in output.token_ids]
            assert got == greedy(self.prompts[name], len(got)), f"{name} was given wrong tokens"
            if outputs and outputs[-1].finish_reason is FinishReason.LENGTH:
                assert len(got) == min(self.max_tokens[name], 40 - len(self.prompts[name]))
            if outputs and outputs[0].prompt_logprobs is not None:
                assert len(outputs[0].prompt_logprobs) == len(self.prompts[name])
            if POISON in self.prompts[name]:
                assert got == []
            elif outputs and outputs[-1].error is not None:
                assert isinstance(outputs[-1].error, (UnavailableError, DeadlineExceededError))

    def teardown(self) -> None:
        """Left alone, every request ends and every block is free."""
        for _ in range(1000):
            if not self.core.has_work:
                break
            self.step(1)
        assert self.live() == []
        assert self.core.scheduler.allocator.num_free == self.NUM_BLOCKS
        self.everything_adds_up()
        self.every_stream_is_a_prefix_of_the_truth()


EngineMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
TestEngine = EngineMachine.TestCase


class ChunkedEngineMachine(EngineMachine):
    """The same where a second group of layers keeps chunks of 10, that begin and end inside blocks."""

    NUM_BLOCKS = 14
    LAYOUT = KVLayout(groups=(KVGroup(layers=(0,), chunk_size=None), KVGroup(layers=(1,), chunk_size=10)))


ChunkedEngineMachine.TestCase.settings = EngineMachine.TestCase.settings
TestChunkedEngine = ChunkedEngineMachine.TestCase
