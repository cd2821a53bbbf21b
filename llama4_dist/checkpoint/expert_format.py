"""How a checkpoint stores its routed experts: what a slice of one takes, and where it may be cut; pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llama4_dist.checkpoint.expert_slices import slice_bounds
from llama4_dist.checkpoint.header import ITEM_BYTES, TensorEntry
from llama4_dist.checkpoint.names import is_routed
from llama4_dist.checkpoint.quantised_blocks import check_cut
from llama4_dist.checkpoint.quantised_tensors import QuantisedEntry
from llama4_dist.checkpoint.scheme import Scheme

MOST_LISTED = 64  # numbers of slices that are tried for a remedy
_WORD_BITS, _WORD_BYTES = 32, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFormat:
    """`item_bytes` are those of a weight, or, where a `scheme` says how weights are quantised, of a scale."""

    item_bytes: int
    scheme: Scheme | None = None

    def slice_bytes(self, hidden_size: int, num_columns: int) -> int:
        """Return the bytes of gate, up and down for `num_columns` of an expert's width, as stored."""
        linears = ((num_columns, hidden_size), (num_columns, hidden_size), (hidden_size, num_columns))
        return sum(self._linear_bytes(num_outputs, width) for num_outputs, width in linears)

    def check_slices(self, expert_width: int, num_slices: int) -> None:
        """Raise ValueError, with the numbers that fit, where a slice would cut a group."""
        if not self._fits(expert_width, num_slices):
            assert self.scheme is not None, "floats are cut anywhere"
            fitting = [n for n in range(1, min(expert_width, MOST_LISTED) + 1) if self._fits(expert_width, n)]
            raise ValueError(
                f"expert_slices={num_slices} cuts groups of experts that are {expert_width} wide and quantised "
                f"({self.scheme.title}): take one of {shown_numbers(fitting)}"
            )

    def _fits(self, expert_width: int, num_slices: int) -> bool:
        if self.scheme is None:
            return True
        try:
            for columns in slice_bounds(expert_width, num_slices):
                check_cut(columns, expert_width, self.scheme)
        except ValueError:
            return False
        return True

    def _linear_bytes(self, num_outputs: int, width: int) -> int:
        if self.scheme is None:
            return num_outputs * width * self.item_bytes
        row_bytes = width
        if self.scheme.is_packed:
            row_bytes = -(-width * self.scheme.number.bits // _WORD_BITS) * _WORD_BYTES
        return num_outputs * (row_bytes + self.scheme.num_groups(width) * self.item_bytes)


def expert_formats(
    entries: Mapping[str, TensorEntry], quantised: Mapping[str, QuantisedEntry], scheme: Scheme | None
) -> tuple[ExpertFormat, ...]:
    """Return the formats that occur among routed experts; a checkpoint may leave some of its layers in floats."""
    parts = {part.name for linear in quantised.values() for part in linear.tensors()}
    plain = {ITEM_BYTES[e.dtype] for name, e in entries.items() if is_routed(name) and e.name not in parts}
    scaled = {ITEM_BYTES[linear.scale.dtype] for name, linear in quantised.items() if is_routed(name)}
    floats = [ExpertFormat(item_bytes=size) for size in sorted(plain)]
    return (*floats, *[ExpertFormat(item_bytes=size, scheme=scheme) for size in sorted(scaled)])


def most_bytes(formats: Iterable[ExpertFormat], hidden_size: int, num_columns: int) -> int:
    """Return the most that a slice takes as stored; 0 without routed experts."""
    return max((one.slice_bytes(hidden_size, num_columns) for one in formats), default=0)


def shown_numbers(numbers: Sequence[int]) -> str:
    """Show ascending numbers, longer runs of them by their ends: 1 to 4, 8, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
