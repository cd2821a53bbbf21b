"""What an expert host runs: a pure function of layer, experts and rows."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from torch import Tensor


class ExpertCompute(Protocol):
    """Row i of `out_RD` may depend on row i of `x_RD`, the layer and the expert alone."""

    @property
    def holds(self) -> AbstractSet[tuple[int, int]]:
        """The (layer, expert) pairs whose weights are here; read for every frame, so it may change."""

    def adopt(self, pairs: Sequence[tuple[int, int]], /) -> None:
        """Bring these weights here too; one of our errors, whose reason the worker is told, where that cannot be."""

    def __call__(self, layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor, /) -> None:
        """Write each expert's output; `groups` are ((expert, num_rows), ...), consecutive in `x_RD`."""
