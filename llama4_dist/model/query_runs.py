"""Decides which queries may share one attention call: it knows counts and positions, and no tensors.

A query's key axis starts at a fixed place, the start of its sequence or of its chunk, and its length depends on the
query's position alone. A product's order of summation depends on its length (MKL halves sums longer than 128, say), so
this is what makes a token's attention the same bits in prefill and decode, alone and in any batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from llama4_dist.model.batch import SequenceSpan

# Keys are padded to one of these lengths, then to multiples of the last.
KEY_LENGTHS = (64, 128, 256)
MAX_GATHERED_KEYS = 1 << 16  # of one decode group; bounds the copy that one attention call reads


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRun:
    """Consecutive queries of one sequence whose key axes start at the same place and have the same padded length.

    `row` is the first query's row of the step; the first query sees `num_keys` keys from position `first_key` on, and
    each further query one more.
    """

    sequence: int
    row: int
    num_queries: int
    first_key: int
    num_keys: int

    @property
    def num_keys_of_last(self) -> int:
        return self.num_keys + self.num_queries - 1


def query_runs(spans: Sequence[SequenceSpan], chunk_size: int | None) -> Iterator[QueryRun]:
    """Cut spans where the key axis changes: at chunk edges, and where its padded length does.

    A query sees the keys of its own chunk up to itself; without chunks, all keys before it.
    """
    row = 0
    for sequence, span in enumerate(spans):
        position, end = span.num_cached, span.num_cached + span.num_tokens
        while position < end:
            first_key = 0 if chunk_size is None else position // chunk_size * chunk_size
            num_keys = position - first_key + 1
            stop = min(end, first_key + padded_keys(num_keys))
            if chunk_size is not None:
                stop = min(stop, first_key + chunk_size)
            yield QueryRun(
                sequence=sequence, row=row, num_queries=stop - position, first_key=first_key, num_keys=num_keys
            )
            row += stop - position
            position = stop


def padded_keys(num_keys: int) -> int:
    """Return the length of the key axis for a query that sees `num_keys` keys; it depends on nothing else."""
    for length in KEY_LENGTHS:
        if num_keys <= length:
            return length
    return -(-num_keys // KEY_LENGTHS[-1]) * KEY_LENGTHS[-1]


def decode_groups(runs: Sequence[QueryRun]) -> Iterator[list[QueryRun]]:
    """Group single queries with key axes of one length, at most MAX_GATHERED_KEYS keys to a group."""
    by_length = sorted(runs, key=lambda run: padded_keys(run.num_keys))
    for length, group in groupby(by_length, key=lambda run: padded_keys(run.num_keys)):
        members, at_most = list(group), max(1, MAX_GATHERED_KEYS // length)
        for start in range(0, len(members), at_most):
            yield members[start : start + at_most]
