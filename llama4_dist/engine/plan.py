"""Decides what one step computes: pure functions of sequence state that return a plan and change nothing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llama4_dist.engine.in_flight import NOTHING_IN_FLIGHT, InFlight
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.page_move import PageMove, page_ids
from llama4_dist.engine.prefix import NO_HIT, PrefixHit, find_prefix
from llama4_dist.engine.room import PagePool, find_room, move_to
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.model.kv_layout import KVLayout

WORTH_WAITING = 4  # blocks that another sequence is computing; fewer are computed twice rather than waited for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedSpan:
    """`num_tokens` pending tokens of one sequence, and how its pages move first (None: they stay)."""

    sequence: SequenceState
    num_tokens: int
    move: PageMove | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """One step: preempt, admit with the prefixes found, carry out all moves of pages, compute the spans in order."""

    spans: tuple[PlannedSpan, ...]
    preempted: tuple[SequenceState, ...]
    admitted: tuple[SequenceState, ...]
    hits: tuple[PrefixHit, ...]  # parallel to `admitted`
    moves: tuple[tuple[SequenceState, PageMove], ...]
    num_parts: int = 1  # in which the step goes through the stages of a model


NOTHING = StepPlan(spans=(), preempted=(), admitted=(), hits=(), moves=())


def plan_step(
    running: Sequence[SequenceState],
    waiting: Sequence[SequenceState],
    *,
    pool: PagePool,
    layout: KVLayout,
    options: EngineOptions,
    served: Callable[[str], int] = lambda tenant: 0,
    max_prompt_tokens: int | None = None,
    flight: InFlight = NOTHING_IN_FLIGHT,
) -> StepPlan:
    """Plan decodes first, oldest first, then prompts: chunks of those that run, and admissions.

    Among prompts of one priority the tenant is next that was `served` least, and within a tenant the oldest request.
    Beside decodes at most `max_prompt_tokens` are computed, so that a long prompt does not stall who is reading.
    A sequence gets pages for all its known tokens when it is admitted, in chunked layers for its chunk, so only
    decoding can run out; then the youngest running sequence is preempted (vLLM's recompute policy). The oldest is
    preempted for no other, and any single sequence fits an empty cache, hence the oldest always advances in the end.
    Both inputs are sorted by `order`. Sequences of steps in `flight` are left as they are, and the step takes its share
    of what is to be done; nothing where the pages that are short can only come from one of them.
    """
    room = find_room(running, flight.sequences, pool=pool, layout=layout, block_size=options.block_size)
    if room is None:
        return NOTHING
    kept, preempted, moves, num_free, freed = room
    idle = [s for s in kept if s not in flight.sequences] if flight.sequences else kept
    # After a preemption nothing is admitted: it would take back the pages that were just freed.
    num_places = 0 if preempted else options.max_num_seqs - len(kept)
    num_coming = min(num_places, len(waiting))
    budget = _Budget(options, layout, num_free)
    decodes = [s for s in idle if s.num_pending == 1]
    if flight.depth > 1:
        decodes = decodes[: flight.share(len(decodes) + flight.num_sampling)]
    spans = [span for s in decodes if (span := budget.spend(s, s.num_cached, moves.get(s.request_id)))]
    candidates = [s for s in idle if s.num_pending > 1]
    prompts = [*candidates, *(s for s in flight.sequences if s.num_pending > 1)]
    num_prompts = len(prompts) + num_coming
    budget.leave_to_prompts(flight, len(spans), num_prompts, max_prompt_tokens)
    most_spans = len(spans) + flight.share(num_prompts)
    admissions = _Admissions(budget, pool, layout, options, num_places=num_places, prompts=prompts, freed=freed)
    if num_places > 0:
        candidates += waiting
    for sequence in sorted(candidates, key=lambda s: (s.order[0], served(s.request.tenant), s.order)):
        if len(spans) == most_spans:
            break
        if sequence.pages:
            span = budget.spend(sequence, sequence.num_cached, moves.get(sequence.request_id))
        else:
            span = admissions.admit(sequence)
        if span:
            spans.append(span)
    with_span = {span.sequence.request_id for span in spans}
    # Who gets no token in this step moves too: what it lets go was counted as free.
    others = [(s, moves[s.request_id]) for s in idle if s.request_id in moves and s.request_id not in with_span]
    return StepPlan(
        spans=tuple(spans),
        moves=(*((span.sequence, span.move) for span in spans if span.move), *others),
        preempted=tuple(preempted),
        admitted=tuple(admissions.admitted),
        hits=tuple(admissions.hits),
        num_parts=flight.num_parts(spans, options.max_num_batched_tokens, len(idle) + num_coming),
    )


class _Admissions:
    """The waiting sequences that a step begins with, and the prefixes they find."""

    def __init__(
        self,
        budget: "_Budget",
        pool: PagePool,
        layout: KVLayout,
        options: EngineOptions,
        *,
        num_places: int,
        prompts: Iterable[SequenceState],
        freed: set[int],
    ) -> None:
        self.admitted: list[SequenceState] = []
        self.hits: list[PrefixHit] = []
        self._budget = budget
        self._pool = pool
        self._layout = layout
        self._block_size = options.block_size
        self._num_places = num_places
        self._freed = freed  # pages that this step's moves leave to nobody, unless an admission finds them
        self._woken: set[int] = set()  # idle pages that an admission of this step holds
        self._coming = {key for s in prompts if (key := _key_ahead(s, s.num_named, self._block_size))}

    def admit(self, sequence: SequenceState) -> PlannedSpan | None:
        """Plan a sequence's first tokens. After one that finds no room none is admitted.

        So nobody overtakes: a long prompt at the head is not starved by short ones behind it.
        """
        if not self._budget.num_tokens or len(self.admitted) >= self._num_places:
            return None
        hit = _hit(sequence, self._pool, self._layout, self._block_size)
        ahead = _key_ahead(sequence, hit.num_blocks, self._block_size)
        if ahead in self._coming:
            return None  # another computes the same just now: its pages will be found
        first = hit.num_blocks * self._block_size
        idle = {page for page in page_ids(hit.pages) if page in self._freed or not self._pool.num_holders(page)}
        move = move_to(hit.pages, first, len(sequence.tokens), self._layout, self._block_size)
        num_needed = move.num_taken + len(idle - self._woken)
        if num_needed > self._budget.num_free:
            self._num_places = 0
            return None
        self._budget.num_free -= num_needed
        span = self._budget.spend(sequence, first, move)
        if span is None:
            self._num_places = 0
            return None
        self._woken |= idle
        if ahead is not None:
            self._coming.add(ahead)
        self.admitted.append(sequence)
        self.hits.append(hit)
        return span


def _hit(sequence: SequenceState, pool: PagePool, layout: KVLayout, block_size: int) -> PrefixHit:
    if sequence.chain is None or sequence.wants_prompt_logprobs:
        return NO_HIT
    return find_prefix(sequence.chain, len(sequence.tokens), layout=layout, block_size=block_size, page_of=pool.page_of)


def _key_ahead(sequence: SequenceState, block: int, block_size: int) -> bytes | None:
    """Name the contents of the WORTH_WAITING blocks from `block` on, if the sequence has so many and names them."""
    last = block + WORTH_WAITING - 1
    if sequence.chain is None or sequence.wants_prompt_logprobs or (last + 1) * block_size > len(sequence.tokens):
        return None
    return sequence.chain.key(last)


class _Budget:
    """Tokens, logit rows and pages left in this step."""

    def __init__(self, options: EngineOptions, layout: KVLayout, num_free: int) -> None:
        self.num_tokens = self._bound = options.max_num_batched_tokens
        self.num_logit_rows = options.max_logit_rows
        self.num_free = num_free
        self._layout = layout
        self._block_size = options.block_size

    def leave_to_prompts(
        self, flight: InFlight, num_decodes: int, num_prompts: int, max_prompt_tokens: int | None
    ) -> None:
        """Go over from decodes to prompts: beside decodes, also those in flight, they may be bounded."""
        bound = self._bound
        self.num_tokens = flight.prompt_share(bound, flight.num_tokens + num_decodes, num_prompts)
        if max_prompt_tokens is not None and (num_decodes or flight.num_decodes):
            most = flight.prompt_share(max_prompt_tokens, flight.num_prompt_tokens, num_prompts)
            self.num_tokens = min(self.num_tokens, most)

    def spend(self, sequence: SequenceState, first: int, move: PageMove | None) -> PlannedSpan | None:
        """Plan the next tokens of a sequence, from position `first` on; its `move` has been paid for."""
        count = min(len(sequence.tokens) - first, self.num_tokens)
        needs_logits = sequence.wants_prompt_logprobs
        if needs_logits:
            count = min(count, self.num_logit_rows)
        if count > 1 and move is not None:
            count, move = self._up_to_the_edge(sequence, first, count, move)
        if count == 0:
            return None
        if needs_logits:
            self.num_logit_rows -= count
        self.num_tokens -= count
        return PlannedSpan(sequence=sequence, num_tokens=count, move=move)

    def _up_to_the_edge(self, sequence: SequenceState, first: int, count: int, move: PageMove) -> tuple[int, PageMove]:
        """Stop a span at the edge of its chunk unless there are pages for the chunks on both sides of it."""
        edge = self._layout.next_edge(first)
        if edge is None or first + count <= edge:
            return count, move
        across = move_to(move.pages, first, len(sequence.tokens), self._layout, self._block_size, end=first + count)
        num_more = across.num_taken - move.num_taken
        if num_more > self.num_free:
            return edge - first, move
        self.num_free -= num_more
        return count, across
