"""Holds the waiting and the running sequences and carries out step plans on them; knows no model and no clock."""

from bisect import insort

from llama4_dist.engine.block_allocator import BlockAllocator
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.plan import StepPlan, plan_step
from llama4_dist.engine.sequence import SequenceState


def _order(sequence: SequenceState) -> tuple[int, int]:
    return sequence.order


class Scheduler:
    """Continuous batching: every step decides anew who runs. Deterministic in the order of calls."""

    def __init__(self, allocator: BlockAllocator, options: EngineOptions) -> None:
        self.allocator = allocator
        self.options = options
        self.waiting: list[SequenceState] = []  # both sorted by order: first come, first served within a priority
        self.running: list[SequenceState] = []
        self.num_preemptions = 0
        self._by_id: dict[str, SequenceState] = {}
        self._lent: dict[str, tuple[int, ...]] = {}

    def add(self, sequence: SequenceState) -> None:
        """Queue a new sequence."""
        assert sequence.request_id not in self._by_id, f"{sequence.request_id} is live already"
        self._by_id[sequence.request_id] = sequence
        insort(self.waiting, sequence, key=_order)

    def get(self, request_id: str) -> SequenceState | None:
        return self._by_id.get(request_id)

    def live(self) -> tuple[SequenceState, ...]:
        return (*self.running, *self.waiting)

    def schedule(self) -> StepPlan:
        """Plan the next step and carry out its preemptions, admissions and block grants."""
        plan = plan_step(self.running, self.waiting, num_free=self.allocator.num_free, options=self.options)
        for sequence in plan.preempted:
            self._preempt(sequence)
        for sequence in plan.admitted:
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_order)
        for span in plan.spans:
            span.sequence.blocks += self.allocator.take(span.sequence.request_id, span.num_new_blocks)
        return plan

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence that ended; its blocks are free at once."""
        del self._by_id[sequence.request_id]
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def borrow(self, owner: str, num_blocks: int) -> tuple[int, ...]:
        """Lend blocks to a holder that is no sequence, preempting the youngest until enough are free."""
        while self.allocator.num_free < num_blocks and self.running:
            self._preempt(self.running[-1])
        blocks = self.allocator.take(owner, num_blocks)
        self._lent[owner] = blocks
        return blocks

    def give_back(self, owner: str) -> None:
        """Take back what was lent to `owner`, if anything."""
        self.allocator.release(owner, self._lent.pop(owner, ()))

    def check(self) -> None:
        """Assert that no block is lost or shared."""
        assert all(not s.blocks and s.num_cached == 0 for s in self.waiting), "a waiting sequence holds blocks"
        held = {s.request_id: tuple(s.blocks) for s in self.running}
        self.allocator.check(held | self._lent)

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=_order)
        self.num_preemptions += 1

    def _release(self, sequence: SequenceState) -> None:
        self.allocator.release(sequence.request_id, sequence.blocks)
        sequence.blocks = []
        sequence.num_cached = 0
