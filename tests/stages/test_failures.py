"""Whatever a stage or a rank does, the step ends, all hear of it, and the next step, or the next group, is right."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import EngineError, Llama4Error, UnavailableError
from llama4_dist.model.batch import Batch, PageRun, SequenceSpan
from llama4_dist.model.expert import Experts
from llama4_dist.partition import Partition
from llama4_dist.stages.in_process import QueueLink, start_group, thread_ranks
from llama4_dist.stages.member import StageRunner
from llama4_dist.stages.pipeline import PipelinedModel
from llama4_dist.stages.ports import StageOutput, take_output, worker_lost
from tests.checkpoints import make_checkpoint
from tests.model.direct import Runner, all_experts
from tests.stages.groups import CountingDirect, group_of_threads, running_group, stage_runner
from tests.stages.test_split import batch_of

TOKENS = list(range(40))
GONE = UnavailableError("expert 3 of layer 1 has no live host", reason="EXPERT_UNREACHABLE")
WRONG = EngineError("rows are not finite", reason="ROWS_NOT_FINITE")


class Failing(CountingDirect):
    """Raises what it is given, once, where it is asked for layer `layer`."""

    def __init__(self, experts: Experts, error: BaseException | None, where: str, layer: int) -> None:
        super().__init__(experts)
        self.error = error
        self.where = where
        self.layer = layer
        self.calls: list[int] = []
        self.before_raising: Callable[[], object] = lambda: None

    def dispatch(
        self, layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor, microbatch: int = 0
    ) -> list[Tensor]:
        self.calls.append(microbatch)
        self._fail("dispatch", layer)
        return [torch.tensor(layer), *super().dispatch(layer, x_TD, experts_TK, scores_TK, microbatch)]

    def combine(self, in_flight: list[Tensor]) -> Tensor:
        self._fail("combine", int(in_flight[0]))
        return super().combine(in_flight[1:])

    def _fail(self, where: str, layer: int) -> None:
        if self.error is not None and (where, layer) == (self.where, self.layer):
            self.before_raising()
            error, self.error = self.error, None
            raise error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("scout"), "scout"))


@pytest.fixture
def start(checkpoint: Checkpoint) -> Iterator[Callable[..., tuple[Runner, Failing]]]:
    """Start a group in which one member fails; returns it and that member's dispatcher."""
    with ExitStack() as resources:

        def started(
            cut: tuple[int, int],
            place: tuple[int, int],
            error: BaseException,
            where: str = "dispatch",
            layer: int = 1,
            **options: Any,
        ) -> tuple[Runner, Failing]:
            made: list[Failing] = []

            def dispatcher_of(stage: int, rank: int, experts: Experts) -> CountingDirect:
                failing = Failing(experts, error if (stage, rank) == place else None, where, layer)
                made.append(failing)
                return failing

            partition = Partition(num_stages=cut[0], num_ranks=cut[1])
            group = group_of_threads(checkpoint, partition, resources, dispatcher_of=dispatcher_of, **options)
            return group, made[place[0] * cut[1] + place[1]]

        yield started


def expected(checkpoint: Checkpoint, num_ranks: int) -> Tensor:
    with running_group(checkpoint, Partition(num_ranks=num_ranks)) as group:
        return group.in_chunks(TOKENS, [40])


@pytest.mark.parametrize("where", ["dispatch", "combine"])
@pytest.mark.parametrize(("cut", "place", "layer"), [((2, 1), (0, 0), 1), ((2, 2), (0, 1), 1), ((2, 2), (1, 0), 3)])
@pytest.mark.parametrize("error", [GONE, WRONG], ids=["gone", "wrong"])
def test_an_error_of_one_members_experts_is_the_steps_and_the_next_step_is_right(
    checkpoint: Checkpoint,
    start: Callable[..., tuple[Runner, Failing]],
    error: Llama4Error,
    cut: tuple[int, int],
    place: tuple[int, int],
    layer: int,
    where: str,
) -> None:
    """Of one rank too: the others learn it where they meet, and none is left waiting."""
    group, _ = start(cut, place, error, where, layer)
    with pytest.raises(type(error)) as raised:
        group.in_chunks(TOKENS, [40])
    assert raised.value.reason != "WORKER_LOST"
    group.restart()
    assert torch.equal(group.in_chunks(TOKENS, [40]), expected(checkpoint, cut[1]))


def test_parts_after_one_that_failed_are_not_computed(start: Callable[..., tuple[Runner, Failing]]) -> None:
    """Their keys would have gaps before them, and their time would be lost."""
    group, failing = start((2, 1), (0, 0), GONE, layer=0, depth=4)
    with pytest.raises(UnavailableError):
        group.in_chunks(TOKENS, [40])
    assert failing.calls == [0]


def test_a_defect_of_a_stage_without_ranks_fails_the_step_only(
    checkpoint: Checkpoint, start: Callable[..., tuple[Runner, Failing]]
) -> None:
    group, _ = start((2, 1), (1, 0), RuntimeError("a defect"), layer=2)
    with pytest.raises(EngineError, match="a stage failed: RuntimeError"):
        group.in_chunks(TOKENS, [40])
    group.restart()
    assert torch.equal(group.in_chunks(TOKENS, [40]), expected(checkpoint, 1))


def test_a_rank_that_breaks_down_is_lost_at_once_and_a_new_group_is_right(
    checkpoint: Checkpoint, start: Callable[..., tuple[Runner, Failing]]
) -> None:
    """Nobody knows where a rank that failed alone would meet the others again, so it leaves them."""
    runners: dict[tuple[int, int], StageRunner] = {}
    group, _ = start((2, 2), (0, 1), RuntimeError("a defect"), timeout_s=60.0, runners=runners)
    model = group.model
    assert isinstance(model, PipelinedModel)
    started_s = time.monotonic()
    for _ in range(2):
        with pytest.raises(UnavailableError) as raised:
            group.in_chunks(TOKENS, [40])
        assert raised.value.reason == "WORKER_LOST"
    assert time.monotonic() - started_s < 10.0, "somebody waited for a rank that was gone"
    for plan in model._plans:
        plan.close()  # type: ignore[attr-defined] # what is left of the old group's parts must not meet the new ranks
    for stage in range(2):
        for rank, ranks in enumerate(thread_ranks(2)):
            runners[stage, rank].rejoin(ranks)
    with ExitStack() as resources:
        again = start_group(
            Partition(num_stages=2, num_ranks=2), lambda stage, rank: runners[stage, rank], resources=resources
        )
        model.reset(again._plans, again._outputs)
        group.restart()
        assert torch.equal(group.in_chunks(TOKENS, [40]), expected(checkpoint, 2))


def test_a_stage_without_ranks_takes_none_when_it_rejoins(start: Callable[..., tuple[Runner, Failing]]) -> None:
    runners: dict[tuple[int, int], StageRunner] = {}
    start((2, 1), (0, 0), GONE, runners=runners)
    with pytest.raises(ValueError, match="had one rank"):
        runners[0, 0].rejoin(thread_ranks(2)[0])


@pytest.mark.parametrize("cut", [(2, 1), (1, 2)], ids=str)
def test_a_member_that_stands_still_ends_the_step_after_the_timeout(
    start: Callable[..., tuple[Runner, Failing]], cut: tuple[int, int]
) -> None:
    group, failing = start(cut, (0, 0), GONE, timeout_s=0.5)
    goes_on = threading.Event()
    failing.before_raising = goes_on.wait
    try:
        with pytest.raises(UnavailableError) as raised:
            group.in_chunks(TOKENS, [40])
        assert raised.value.reason == "WORKER_LOST"
    finally:
        goes_on.set()


def test_rows_that_only_one_rank_was_given_fail_all_ranks_together(checkpoint: Checkpoint) -> None:
    """The stage before failed for the other: both say so, wait for nobody, and are in step for the next part."""
    partition, ranks = Partition(num_stages=2, num_ranks=2), thread_ranks(2, timeout_s=60.0)
    direct = CountingDirect(all_experts(checkpoint, torch.float32))
    members = [stage_runner(checkpoint, partition, 1, rank, ranks[rank], direct, pages=8) for rank in range(2)]
    rows_TD = torch.zeros(3, checkpoint.config.hidden_size)
    outputs = _run_together(members, step=1, befores=[rows_TD, GONE])
    assert all(isinstance(output.rows, UnavailableError) for output in outputs)
    assert [member.lost for member in members] == [None, None]
    outputs = _run_together(members, step=2, befores=[rows_TD.clone(), rows_TD.clone()])
    assert all(isinstance(output.rows, Tensor) for output in outputs)


def _run_together(members: list[StageRunner], *, step: int, befores: list[Any]) -> list[StageOutput]:
    pages = tuple(PageRun(first_block=0, ids=(number,)) for number in range(4))
    span = SequenceSpan(num_tokens=3, num_cached=0, pages=pages)
    part = Batch(step=step, token_ids_T=torch.tensor([1, 2, 3]), spans=(span,), logit_rows=(2,))
    outputs = [StageOutput(step=step, microbatch=0, rows=rows) for rows in befores]
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(lambda member, before: member.run(part, before), members, outputs))


def test_hosts_that_any_member_proves_wrong_are_counted_by_the_leader(
    checkpoint: Checkpoint, start: Callable[..., tuple[Runner, Failing]]
) -> None:
    group, member = start((2, 2), (0, 1), GONE, layer=-1)
    member.stats().wrong_answers["e7"] += 2
    group.in_chunks(TOKENS, [20])
    assert isinstance(group.dispatcher, CountingDirect)
    assert group.dispatcher.stats().wrong_answers == {"e7": 2}, "counted twice, or by nobody"


def test_an_output_of_a_step_nobody_waited_for_is_dropped() -> None:
    link, (part, _) = QueueLink(), batch_of([4], step=7, num_parts=2)
    for step, microbatch in [(6, 0), (6, 1), (7, 0)]:
        link.put(StageOutput(step=step, microbatch=microbatch, rows=worker_lost("old")))
    assert take_output(link, part, 1.0).place == (7, 0)


def test_an_output_that_was_lost_is_no_reason_to_wait() -> None:
    link, (part, _) = QueueLink(), batch_of([4], step=7, num_parts=2)
    link.put(StageOutput(step=7, microbatch=1, rows=worker_lost("later")))
    with pytest.raises(UnavailableError, match="was lost"):
        take_output(link, part, 60.0)


def test_who_waits_at_a_closed_link_is_told() -> None:
    link = QueueLink()
    threading.Timer(0.05, link.close).start()
    with pytest.raises(UnavailableError, match="gone"):
        link.take(60.0)
    with pytest.raises(UnavailableError, match="gone"):
        link.put(StageOutput(step=1, microbatch=0, rows=torch.zeros(1, 1)))


def test_a_rank_that_leaves_wakes_those_that_gather() -> None:
    first, second = thread_ranks(2, timeout_s=60.0)
    threading.Timer(0.05, second.abort).start()
    with pytest.raises(UnavailableError, match="gone"):
        first.gather(torch.zeros(1, 1))
