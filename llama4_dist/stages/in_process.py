"""An attention group in one process: a thread per member, queues between stages, shared memory between ranks."""

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from llama4_dist.errors import Llama4Error
from llama4_dist.model.batch import Batch
from llama4_dist.partition import Partition
from llama4_dist.stages.member import StageMember, StageRunner
from llama4_dist.stages.part_record import PartRecord
from llama4_dist.stages.pipeline import PipelinedModel
from llama4_dist.stages.ports import TIMEOUT_S, Inlet, Outlet, StageOutput, worker_lost
from llama4_dist.telemetry.tracing import ours

_CLOSED = None
RunnerOf = Callable[[int, int], StageRunner]  # stage, rank


class QueueLink:
    """`Outlet` and `Inlet` in one; once it is closed, whoever waits is told."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[StageOutput | None] = queue.SimpleQueue()
        self._closed = False

    def put(self, output: StageOutput) -> None:
        if self._closed:
            raise worker_lost("the next stage is gone")
        self._queue.put(output)

    def take(self, timeout_s: float) -> StageOutput:
        try:
            output = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            raise worker_lost(f"a stage said nothing for {timeout_s:g} s") from None
        if output is _CLOSED:
            self._queue.put(_CLOSED)  # the next to ask is told too
            raise worker_lost("the stage before is gone")
        return output

    def close(self) -> None:
        self._closed = True
        self._queue.put(_CLOSED)


class ThreadRanks:
    """`Ranks` of a stage whose ranks are threads; made all at once by `thread_ranks`."""

    def __init__(
        self, rank: int, places: list[Tensor], barrier: threading.Barrier, device: torch.device | str = "cpu"
    ) -> None:
        self.rank = rank
        self.num_ranks = len(places)
        self.device = torch.device(device)
        self._places = places
        self._barrier = barrier

    def gather(self, own_ND: Tensor) -> Tensor:
        try:
            self._places[self.rank] = own_ND
            self._barrier.wait()
            gathered = torch.stack(self._places)
            self._barrier.wait()  # the others may still be reading what this one is about to overwrite
        except threading.BrokenBarrierError:
            raise worker_lost("a rank of this stage is gone") from None
        return gathered

    def abort(self) -> None:
        self._barrier.abort()


def thread_ranks(
    num_ranks: int, *, device: torch.device | str = "cpu", timeout_s: float = TIMEOUT_S
) -> tuple[ThreadRanks, ...]:
    """Return the ranks of one stage."""
    places, barrier = [torch.empty(0)] * num_ranks, threading.Barrier(num_ranks, timeout=timeout_s)
    return tuple(ThreadRanks(rank, places, barrier, device) for rank in range(num_ranks))


class MemberThread:
    """`PlanPort` of a member that computes in a thread of its own."""

    def __init__(self, member: StageMember, name: str, after: QueueLink) -> None:
        self._member = member
        self._after = after
        self._plans: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, part: Batch) -> None:
        if not self._thread.is_alive():
            raise worker_lost(f"{self._thread.name} has ended")
        self._plans.put(part)

    def close(self) -> None:
        self._plans.put(_CLOSED)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while (part := self._plans.get()) is not _CLOSED:
                self._member.compute(part)
        except Llama4Error:
            return  # the next stage is gone; who is before learns it from the closed link
        finally:
            self._after.close()


def start_group(
    partition: Partition,
    runner_of: RunnerOf,
    *,
    resources: ExitStack,
    depth: int | None = None,
    num_microbatches: int = 1,
    timeout_s: float = TIMEOUT_S,
) -> PipelinedModel:
    """Start the members of a group and return its leader's model; `resources` ends them."""
    plans: list[MemberThread] = []
    inlets: Sequence[QueueLink] = ()
    for stage in range(partition.num_stages):
        links = tuple(QueueLink() for _ in range(partition.num_ranks))
        for rank, after in enumerate(links):
            before: Inlet | None = inlets[rank] if inlets else None
            outlet: Outlet = after
            record = PartRecord(ours(stage=stage, rank=rank))
            member = StageMember(
                runner_of(stage, rank), before=before, after=outlet, record=record, timeout_s=timeout_s
            )
            plans.append(MemberThread(member, f"stage-{stage}-rank-{rank}", after))
        inlets = links
    for plan in plans:
        resources.callback(plan.close)
    return PipelinedModel(
        plans,
        inlets,
        depth=depth or partition.num_stages,
        num_microbatches=num_microbatches,
        timeout_s=timeout_s,
    )
