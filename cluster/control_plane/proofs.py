"""Compares what two hosts say of the same expert: digests of weights and of answers to fixed rows. Asks no host."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from cluster.planning.movement import Move
from cluster.planning.placement import Pair
from llama4_dist.errors import EngineError

Prints = Mapping[str, Mapping[Pair, str]]  # host to its fingerprints


def to_prove(moves: Iterable[Move]) -> dict[str, set[Pair]]:
    """Return what each host of these moves has to be asked for, sources too."""
    wanted: dict[str, set[Pair]] = defaultdict(set)
    for move in moves:
        wanted[move.target].add(move.pair)
        if move.source is not None:
            wanted[move.source].add(move.pair)
    return wanted


def compare(moves: Iterable[Move], prints: Prints) -> int:
    """Return how many new copies have no source to be compared with; EngineError (VERIFICATION_FAILED) on the first
    that differs from its source, or is not there.
    """
    num_unverified = 0
    for move in moves:
        layer, expert = move.pair
        proof = prints[move.target].get(move.pair)
        if proof is None:
            raise EngineError(
                f"{move.target} was to map expert {expert} of layer {layer} and does not hold it",
                reason="VERIFICATION_FAILED",
            )
        against = prints.get(move.source or "", {}).get(move.pair)
        num_unverified += against is None
        if against is not None and proof != against:
            raise EngineError(
                f"expert {expert} of layer {layer} differs between {move.source} and {move.target}: "
                "do both see the same checkpoint?",
                reason="VERIFICATION_FAILED",
            )
    return num_unverified
