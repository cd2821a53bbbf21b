"""Holds the waiting and the running sequences and carries out step plans on them; knows no model and no clock."""

from bisect import insort

from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.page_allocator import PageAllocator
from llama4_dist.engine.page_move import PageMove, Pages, page_ids
from llama4_dist.engine.plan import StepPlan, plan_step
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.model.kv_layout import KVLayout


def _order(sequence: SequenceState) -> tuple[int, int]:
    return sequence.order


class Scheduler:
    """Continuous batching: every step decides anew who runs. Deterministic in the order of calls."""

    def __init__(self, allocator: PageAllocator, layout: KVLayout, options: EngineOptions) -> None:
        self.allocator = allocator
        self.layout = layout
        self.options = options
        self.waiting: list[SequenceState] = []  # both sorted by order: first come, first served within a priority
        self.running: list[SequenceState] = []
        self.num_preemptions = 0
        self._by_id: dict[str, SequenceState] = {}
        self._lent: dict[str, Pages] = {}

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
        """Plan the next step and carry out its preemptions, admissions and moves of pages."""
        plan = plan_step(self.running, self.waiting, pool=self.allocator, layout=self.layout, options=self.options)
        for sequence in plan.preempted:
            self._preempt(sequence)
        for sequence in plan.admitted:
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_order)
        moves = [(span.sequence, span.move) for span in plan.spans if span.move is not None]
        for _, move in moves:
            self.allocator.release(move.dropped)
        for sequence, move in moves:
            sequence.pages = move.apply(self.allocator.take(move.num_taken))
        return plan

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence that ended; its pages are free at once."""
        del self._by_id[sequence.request_id]
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def borrow(self, owner: str, *, num_cached: int, end: int, num_known: int) -> Pages:
        """Lend pages to a holder that is no sequence, for positions [num_cached, end) of a text of `num_known`.

        Its pages of before move; the youngest sequences are preempted until there are enough.
        """
        blocks = self.layout.blocks(
            num_cached=num_cached, end=end, num_known=num_known, block_size=self.options.block_size
        )
        move = PageMove(pages=self._lent.get(owner, ()), blocks=blocks)
        self.allocator.release(move.dropped)
        while self.allocator.num_free < move.num_taken and self.running:
            self._preempt(self.running[-1])
        self._lent[owner] = move.apply(self.allocator.take(move.num_taken))
        return self._lent[owner]

    def give_back(self, owner: str) -> None:
        """Take back what was lent to `owner`, if anything."""
        self.allocator.release(page_ids(self._lent.pop(owner, ())))

    def check(self) -> None:
        """Assert that no page is lost, and none is held by two."""
        assert all(not s.pages and s.num_cached == 0 for s in self.waiting), "a waiting sequence holds pages"
        held = [*(s.pages for s in self.running), *self._lent.values()]
        self.allocator.check(page for pages in held for page in page_ids(pages))

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=_order)
        self.num_preemptions += 1

    def _release(self, sequence: SequenceState) -> None:
        self.allocator.release(page_ids(sequence.pages))
        sequence.pages = ()
        sequence.num_cached = 0
