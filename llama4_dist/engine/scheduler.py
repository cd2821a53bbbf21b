"""Holds the waiting and the running sequences and carries out step plans on them; knows no model and no clock."""

from bisect import insort
from collections.abc import Iterable, Iterator

from llama4_dist.engine.fair_share import FairShare
from llama4_dist.engine.in_flight import NOTHING_IN_FLIGHT, InFlight
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.page_allocator import PageAllocator
from llama4_dist.engine.page_move import PageMove, Pages, page_ids
from llama4_dist.engine.plan import PlannedSpan, StepPlan, plan_step
from llama4_dist.engine.prefix import PrefixChain, PrefixHit
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.model.kv_layout import KVLayout


def _order(sequence: SequenceState) -> tuple[int, int]:
    return sequence.order


class Scheduler:
    """Continuous batching: every step decides anew who runs. Deterministic in the order of calls."""

    def __init__(
        self, allocator: PageAllocator, layout: KVLayout, options: EngineOptions, *, fingerprint: bytes = b""
    ) -> None:
        """`fingerprint` stands for all that the contents of a page depend on besides the tokens."""
        self.allocator = allocator
        self.layout = layout
        self.options = options
        self.waiting: list[SequenceState] = []  # both sorted by order: first come, first served within a priority
        self.running: list[SequenceState] = []
        self.num_preemptions = 0
        self.num_prefix_hits = 0
        self.num_prefix_tokens = 0
        self.shares = FairShare()
        self._fingerprint = fingerprint
        self._by_id: dict[str, SequenceState] = {}
        self._lent: dict[str, Pages] = {}

    def add(self, sequence: SequenceState) -> None:
        """Queue a new sequence."""
        assert sequence.request_id not in self._by_id, f"{sequence.request_id} is live already"
        self._by_id[sequence.request_id] = sequence
        self.shares.enter(sequence.request.tenant)
        if self.options.enable_prefix_caching:
            root = b"\0".join((self._fingerprint, sequence.request.tenant.encode()))
            sequence.chain = PrefixChain(sequence.tokens, root=root, block_size=self.options.block_size)
        insort(self.waiting, sequence, key=_order)

    def get(self, request_id: str) -> SequenceState | None:
        return self._by_id.get(request_id)

    def live(self) -> tuple[SequenceState, ...]:
        return (*self.running, *self.waiting)

    def schedule(self, *, max_prompt_tokens: int | None = None, flight: InFlight = NOTHING_IN_FLIGHT) -> StepPlan:
        """Plan the next step and carry out its preemptions, admissions and moves of pages.

        Pages that a sequence of a step in `flight` gave back at its end may go to this one: every stage computes steps
        in their order, so what the earlier one still writes there is overwritten before it is read.
        """
        plan = plan_step(
            self.running,
            self.waiting,
            pool=self.allocator,
            layout=self.layout,
            options=self.options,
            served=self.shares.served,
            max_prompt_tokens=max_prompt_tokens,
            flight=flight,
        )
        for span in plan.spans:
            self.shares.charge(span.sequence.request.tenant, span.num_tokens)
        for sequence in plan.preempted:
            self._preempt(sequence)
        for sequence, hit in zip(plan.admitted, plan.hits, strict=True):
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_order)
            self._start_after(sequence, hit)
        for _, move in plan.moves:
            self.allocator.release(move.dropped)
        for sequence, move in plan.moves:
            sequence.hold(move.apply(self.allocator.take(move.num_taken)), self.options.block_size)
        return plan

    def keep_prefixes(self, spans: Iterable[PlannedSpan]) -> None:
        """Name the blocks that a computed step has filled, so that others find them."""
        for span in spans:
            sequence = span.sequence
            if sequence.chain is None:
                continue
            num_full = sequence.num_cached // self.options.block_size
            for block in range(sequence.num_named, num_full):
                self._name(sequence, block)
            sequence.num_named = num_full

    def forget_prefixes(self) -> None:
        """Let nothing be found that was computed up to now, nor what running sequences will build on it."""
        self.allocator.forget_names()
        for sequence in self.running:
            sequence.chain = None

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence that ended; its pages are free at once."""
        del self._by_id[sequence.request_id]
        self.shares.leave(sequence.request.tenant)
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
        for sequence in self.running:
            self._check_names(sequence)

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=_order)
        self.num_preemptions += 1

    def _release(self, sequence: SequenceState) -> None:
        self.allocator.release(_ends_first(sequence.pages))
        sequence.hold((), self.options.block_size)
        sequence.num_cached = sequence.num_named = 0

    def _start_after(self, sequence: SequenceState, hit: PrefixHit) -> None:
        """Let a sequence begin behind a prefix that others have computed."""
        self.allocator.hold(page_ids(hit.pages))
        sequence.hold(hit.pages, self.options.block_size)
        sequence.num_named = hit.num_blocks
        sequence.num_cached = hit.num_blocks * self.options.block_size
        self.num_prefix_hits += hit.num_blocks > 0
        self.num_prefix_tokens += sequence.num_cached

    def _name(self, sequence: SequenceState, block: int) -> None:
        assert sequence.chain is not None, "only what has a chain is named"
        key = sequence.chain.key(block)
        for group, run in enumerate(sequence.pages):
            if run.first_block <= block < run.stop_block:
                self.allocator.name(run.ids[block - run.first_block], (group, key))

    def _check_names(self, sequence: SequenceState) -> None:
        """Assert that what a sequence shares is full, its own tenant's, and the very tokens it has."""
        for group, run in enumerate(sequence.pages):
            for block, page in enumerate(run.ids, start=run.first_block):
                if (name := self.allocator.key_of(page)) is not None:
                    assert block < sequence.num_named, "a page with a name may be written to"
                    assert sequence.chain is not None, "a named page is in a sequence that names none"
                    assert name == (group, sequence.chain.key(block)), "a page holds other tokens, or another tenant's"


def _ends_first(pages: Pages) -> Iterator[int]:
    """Return all pages, the last blocks first: a prefix is of use without its end, not without its start."""
    blocks = sorted(((run.first_block + i, page) for run in pages for i, page in enumerate(run.ids)), reverse=True)
    return (page for _, page in blocks)
