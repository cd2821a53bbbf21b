"""Any interleaving of requests, kills, stops and changes that a search finds: what holds in schedules holds here.

Needs PYTHONHASHSEED=0: sets of names must iterate alike, or the search calls the machine flaky. test_schedules runs it.
"""

import logging
import os
from contextlib import ExitStack

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.simulation import strikes
from tests.simulation.plan import CALL_BLOWS, CALL_POINTS, DATA_BLOWS, DATA_POINTS, Blow, draw_plan
from tests.simulation.schedule import come_to_rest, release
from tests.simulation.stand_ins import installed
from tests.simulation.world import World


class Machine(RuleBasedStateMachine):
    """A world whose actions and moments are chosen one by one."""

    world: World

    @initialize(seed=st.integers(0, 50))
    def begin(self, seed: int) -> None:
        logging.disable(logging.CRITICAL)
        self.world = World(draw_plan(seed), seed)
        self.patches = ExitStack()
        self.patches.enter_context(installed(self.world))
        self.world.driver.start()
        self.world.armed = True
        self.world.blows.clear()

    @rule(action=st.sampled_from(sorted(strikes.ACTIONS)))
    def act(self, action: str) -> None:
        strikes.act(self.world, action)
        self.world.pass_time(0.01)

    @rule()
    def submit_and_step(self) -> None:
        strikes.submit(self.world)
        self.world.step_all()

    @rule(point=st.sampled_from(DATA_POINTS), left=st.integers(1, 6), action=st.sampled_from(DATA_BLOWS))
    def plan_a_blow(self, point: str, left: int, action: str) -> None:
        self.world.blows.append(Blow(point, left, action))

    @rule(point=st.sampled_from(CALL_POINTS), left=st.integers(1, 3), action=st.sampled_from(CALL_BLOWS))
    def plan_a_blow_at_a_call(self, point: str, left: int, action: str) -> None:
        self.world.blows.append(Blow(point, left, action))

    @invariant()
    def nothing_is_broken(self) -> None:
        if hasattr(self, "world"):
            self.world.judge.look()
            assert not self.world.judge.breaches, "\n".join(self.world.trace)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if not self.world.judge.breaches:
                come_to_rest(self.world)
                assert not self.world.judge.breaches, "\n".join(self.world.trace)
        finally:
            release(self.world)
            self.patches.close()
            logging.disable(logging.NOTSET)


@pytest.mark.skipif(os.environ.get("PYTHONHASHSEED") != "0", reason="test_schedules runs it with PYTHONHASHSEED=0")
@pytest.mark.timeout(300)
class TestMachine(Machine.TestCase):  # type: ignore[misc, valid-type]
    """The search itself."""


TestMachine.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
