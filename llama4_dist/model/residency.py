"""Which expert slices a host keeps in memory when not all may stay: the least recently used go. Reads no weights.

The kernel would choose by itself, but page by page, knowing neither slices nor whose limit it is; and copies (int8) are
not its to drop.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import ConfigError
from llama4_dist.model.weight_format import INT8

Pair = tuple[int, int]  # (layer, unit)
Group = tuple[int, int]  # (unit, num_rows)


class Residency:
    """Keeps at most `limit_bytes` of slices, or the one that is computed if that is larger. Thread-safe.

    `bytes_of` is what a slice takes; `read_ahead` has its reading begun, `let_go` takes it out of memory.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        bytes_of: Callable[[Pair], int],
        read_ahead: Callable[[Pair], None],
        let_go: Callable[[Pair], None],
    ) -> None:
        self.limit_bytes = limit_bytes
        self.hits = 0  # slices that were in memory when their rows came
        self.misses = 0
        self._bytes_of = bytes_of
        self._read_ahead = read_ahead
        self._let_go = let_go
        self._resident: OrderedDict[Pair, int] = OrderedDict()  # with bytes; least recently used first
        self._lock = Lock()

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    @property
    def bytes_resident(self) -> int:
        with self._lock:
            return sum(self._resident.values())

    def is_resident(self, pair: Pair) -> bool:
        return pair in self._resident

    def parts(self, layer: int, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        """Yield the groups in runs that fit together; when one is yielded, its slices are being read.

        Compute each run before the next is asked for.
        """
        first = num_bytes = 0
        for at, (unit, num_rows) in enumerate(groups):
            size = self._bytes_of((layer, unit)) if num_rows else 0
            if at > first and num_bytes + size > self.limit_bytes:
                self._bring(layer, groups[first:at])
                yield groups[first:at]
                first, num_bytes = at, 0
            num_bytes += size
        if first < len(groups):
            self._bring(layer, groups[first:])
            yield groups[first:]

    def forget(self, pair: Pair) -> None:
        """Note that a slice is not held any more."""
        with self._lock:
            self._resident.pop(pair, None)

    def _bring(self, layer: int, groups: Sequence[Group]) -> None:
        """Make room for the slices with rows, then have those read that are not there."""
        wanted = {(layer, unit): self._bytes_of((layer, unit)) for unit, num_rows in groups if num_rows}
        with self._lock:
            missing = [pair for pair in wanted if pair not in self._resident]
            self.hits += len(wanted) - len(missing)
            self.misses += len(missing)
            for pair in wanted.keys() - set(missing):
                self._resident.move_to_end(pair)
            leaving = self._make_room(wanted, sum(wanted[pair] for pair in missing))
            self._resident |= {pair: wanted[pair] for pair in missing}
        for pair in leaving:
            self._let_go(pair)
        for pair in missing:
            self._read_ahead(pair)

    def _make_room(self, wanted: Mapping[Pair, int], num_bytes: int) -> list[Pair]:
        """Take out what has to go for `num_bytes` more, but nothing that is wanted."""
        total = num_bytes + sum(self._resident.values())
        leaving = []
        for pair, size in list(self._resident.items()):
            if total <= self.limit_bytes:
                break
            if pair not in wanted:
                leaving.append(pair)
                total -= size
                del self._resident[pair]
        return leaving


def check_residency(
    limit_bytes: int, checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, weight_format: str
) -> None:
    """Raise ConfigError for a bound that cannot be kept: on weights that are copied whole before any row comes."""
    if limit_bytes < 1:
        raise ConfigError(f"expert_memory_bytes={limit_bytes} must be at least 1, or left out for no bound")
    if torch.device(device).type != "cpu":
        raise ConfigError(
            f"expert_memory_bytes needs device='cpu', not {device!r}: a device holds copies of all its experts"
        )
    has_floats = any(one.scheme is None for one in checkpoint.expert_formats)
    stored = checkpoint.config.dtype
    if has_floats and weight_format != INT8 and f"torch.{stored}" != str(dtype):
        raise ConfigError(
            f"expert_memory_bytes needs weights computed as they are stored ({stored}), not in {dtype}: "
            "take dtype='auto' or weights='int8'"
        )
