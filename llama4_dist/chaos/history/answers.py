"""Compares what requests were given with what a reference says; knows nothing of time and faults."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from llama4_dist.chaos.history.events import Event
from llama4_dist.chaos.history.reference import Reference
from llama4_dist.chaos.history.requests import Request, Violation, judge_end, read_requests


def judge_requests(
    events: Iterable[Event], reference: Reference | None, allowed_errors: Collection[str] = ()
) -> tuple[Counter[str], list[Violation]]:
    """Return how many requests ended how, and what was wrong. Without a reference, tokens are not compared."""
    outcomes: Counter[str] = Counter()
    violations: list[Violation] = []
    for request in read_requests(events):
        outcome = judge_end(request, allowed_errors)
        outcomes[outcome] += 1
        if reference is not None:
            compare(request, reference, is_whole=outcome == "finished")
        violations += request.violations
    return outcomes, violations


def compare(request: Request, reference: Reference, *, is_whole: bool) -> None:
    """Compare tokens with the reference's: all of them if the request finished, else those that came."""
    wanted = reference.of(request.prompt, request.sampling)
    if wanted is None:
        if request.tokens:
            request.accuse("no_reference", "the reference holds no request with this prompt and sampling")
        return
    for index in range(max(len(wanted), *(index + 1 for index in request.tokens), 1)):
        right: Sequence[int] = wanted[index] if index < len(wanted) else ()
        compare_sequence(request, index, right, is_whole=is_whole)


def compare_sequence(request: Request, index: int, right: Sequence[int], *, is_whole: bool) -> None:
    given = request.tokens.get(index, {})
    for position, token in sorted(given.items()):
        if position >= len(right):
            request.accuse("wrong_token", f"sequence {index} has token {position}; it should end after {len(right)}")
            return
        if token != right[position]:
            request.accuse("wrong_token", f"sequence {index} token {position} is {token}, not {right[position]}")
            return
    if is_whole and len(given) < len(right):
        request.accuse("wrong_token", f"sequence {index} finished with {len(given)} of {len(right)} tokens")
