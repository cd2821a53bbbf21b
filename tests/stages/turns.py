"""A group whose stages are fake models that take turns in one thread, so that a test says who computes when.

Members, ports and the leader's model are the real ones; only the arithmetic and the links are not. Nothing is computed
before the leader waits for an output, or the test says so: then `pick` says which of the stages that can goes on.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from llama4_dist.engine.engine import EngineCore
from llama4_dist.model.batch import Batch
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import KVLayout
from llama4_dist.model.reduction import Reduction
from llama4_dist.stages.member import StageMember, StageRunner
from llama4_dist.stages.pipeline import PipelinedModel
from llama4_dist.stages.ports import StageOutput, worker_lost
from tests.engine.fake_model import LAYOUT, FakeDispatcher, FakeModel, fake_core

Pick = Callable[[Sequence[int]], int]


class FakeStage:
    """What a member computes: all of a fake model, which has its own keys."""

    reduction: Reduction | None = None

    def __init__(self, model: FakeModel) -> None:
        self.model = model

    def forward(self, batch: Batch, cache: Any, dispatcher: Any, rows_TD: Tensor | None = None) -> Tensor:
        return self.model.forward(batch, cache, dispatcher)


class Link:
    """`Outlet` and `Inlet`; who takes from an empty one has `wait` make something come."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.outputs: deque[StageOutput] = deque()
        self._wait = wait

    def put(self, output: StageOutput) -> None:
        self.outputs.append(output)

    def take(self, timeout_s: float) -> StageOutput:
        while not self.outputs:
            self._wait()
        return self.outputs.popleft()


class Member:
    """`PlanPort` of a stage that computes when it is told to."""

    def __init__(self, member: StageMember) -> None:
        self.member = member
        self.parts: deque[Batch] = deque()

    def submit(self, part: Batch) -> None:
        self.parts.append(part)


class Stages:
    """One formation of a group. `computed` is (stage, part) in order; `turns` the stages that computed in each."""

    def __init__(self, num_stages: int, *, block_size: int = 4, layout: KVLayout = LAYOUT, pick: Pick = max) -> None:
        self.models = [FakeModel(block_size, layout) for _ in range(num_stages)]
        self.computed: list[tuple[int, Batch]] = []
        self.turns: list[tuple[int, ...]] = []
        self.lost = False
        self.wait: Callable[[], None] = self.one
        self._pick = pick
        self._links = [Link(self._come) for _ in range(num_stages)]
        befores = [None, *self._links[:-1]]
        self.members = [
            Member(StageMember(_runner(model), before=before, after=after))
            for model, before, after in zip(self.models, befores, self._links, strict=True)
        ]

    @property
    def outputs(self) -> list[Link]:
        return self._links[-1:]

    @property
    def model(self) -> PipelinedModel:
        return PipelinedModel(self.members, self.outputs, depth=len(self.members))

    def ready(self) -> list[int]:
        """Return the stages that have a part and the rows before it."""
        links = [None, *self._links]
        return [s for s, member in enumerate(self.members) if member.parts and (s == 0 or links[s].outputs)]  # type: ignore[union-attr]

    def one(self) -> None:
        """Have one stage compute one part."""
        self._compute(self._pick(self.ready()))

    def turn(self) -> None:
        """Have every stage that can compute one part."""
        ready = self.ready()
        self.turns.append(tuple(ready))
        for stage in reversed(ready):
            self._compute(stage)

    def _compute(self, stage: int) -> None:
        part = self.members[stage].parts.popleft()
        self.computed.append((stage, part))
        self.members[stage].member.compute(part)

    def _come(self) -> None:
        if self.lost or not self.ready():
            raise worker_lost("a member is gone" if self.lost else "nothing is under way")
        self.wait()


def staged_core(stages: Stages, **options: Any) -> EngineCore:
    """Return an engine core over the stages."""
    return fake_core(model=stages.model, **options)


def _runner(model: FakeModel) -> StageRunner:
    return StageRunner(FakeStage(model), cast(KVCache, None), cast(Any, FakeDispatcher()))
