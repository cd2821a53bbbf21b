"""Any interleaving, as for one step at a time, where stages compute several in an order that chance picks."""

from random import Random
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import precondition, rule

from llama4_dist.engine.engine import EngineCore
from llama4_dist.stages.ports import worker_lost
from tests.engine.test_engine_machine import ChunkedEngineMachine, EngineMachine
from tests.stages.turns import Stages, staged_core


class SteadyMachine(EngineMachine):
    """A group of three stages, which may be lost and formed anew."""

    NUM_STAGES = 3

    def new_core(self, **options: Any) -> EngineCore:
        self.random = Random(0)
        self.stages = self.new_stages()
        return staged_core(self.stages, **options)

    def new_stages(self) -> Stages:
        stages = Stages(self.NUM_STAGES, layout=self.LAYOUT, pick=self.random.choice)
        self.models = stages.models
        return stages

    @precondition(lambda self: self.stages.ready())
    @rule(count=st.integers(1, 4))
    def compute(self, count: int) -> None:
        for _ in range(count):
            if self.stages.ready():
                self.stages.one()

    @rule()
    def begin(self) -> None:
        """Steps that nobody waits for yet: what comes next finds them in flight."""
        if self.core.lost is None:
            self.core._begin_steps(self.now_s)

    @rule(told=st.booleans(), steps=st.integers(0, 2))
    def lose_the_group(self, told: bool, steps: int) -> None:
        self.stages.lost = True
        if told:
            self.take(self.core.lose(worker_lost("a member died")))
        for _ in range(steps):
            self.take(self.core.step())
        self.stages = self.new_stages()
        self.before_each_part(self.refuse_poison)
        self.core.runner.model.reset(self.stages.members, self.stages.outputs)  # type: ignore[attr-defined]
        self.take(self.core.renew())


SteadyMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestSteady = SteadyMachine.TestCase


class ChunkedSteadyMachine(SteadyMachine):
    """The same where a second group of layers keeps chunks."""

    NUM_BLOCKS = ChunkedEngineMachine.NUM_BLOCKS
    LAYOUT = ChunkedEngineMachine.LAYOUT
    NUM_STAGES = 2


ChunkedSteadyMachine.TestCase.settings = SteadyMachine.TestCase.settings
TestChunkedSteady = ChunkedSteadyMachine.TestCase
