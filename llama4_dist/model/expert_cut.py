"""How experts of one model are cut into slices: where each lies in its expert, and what it takes. Holds no weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llama4_dist.checkpoint.expert_slices import slice_bounds
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.units import slice_of
from llama4_dist.errors import ConfigError
from llama4_dist.model.expert_bytes import computed_bytes, held_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCut:
    """Columns and bytes of each slice, the same for all experts: the most, where layers are stored in two formats.

    `slice_bytes` are those that a slice takes for as long as it is held, `computed_bytes` those that it has in memory
    from its rows on; they differ where experts are expanded.
    """

    bounds: tuple[range, ...]
    slice_bytes: tuple[int, ...]
    computed_bytes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        weight_format: str,
        num_slices: int,
    ) -> "ExpertCut":
        """Cut the experts of a checkpoint; ConfigError where that cannot be, or would part a group that has a scale."""
        config, formats = checkpoint.config, checkpoint.expert_formats
        try:
            bounds = slice_bounds(config.expert_width, num_slices)
            for one in formats:
                one.check_slices(config.expert_width, num_slices)
        except ValueError as error:
            raise ConfigError(str(error)) from None

        def most(count: Callable[..., int], columns: range) -> int:
            how: dict[str, Any] = {"dtype": dtype, "device": device, "weight_format": weight_format}
            return max((count(one, config.hidden_size, len(columns), **how) for one in formats), default=0)

        return cls(
            bounds=bounds,
            slice_bytes=tuple(most(held_bytes, columns) for columns in bounds),
            computed_bytes=tuple(most(computed_bytes, columns) for columns in bounds),
        )

    @property
    def num_slices(self) -> int:
        return len(self.bounds)

    @property
    def most_columns(self) -> int:
        return max(map(len, self.bounds))

    @property
    def most_bytes(self) -> int:
        """What room is planned with: the bytes of the largest slice."""
        return max(self.slice_bytes)

    def bytes_of(self, unit: int) -> int:
        """Return the bytes that a unit takes where it is held."""
        return self.slice_bytes[unit % self.num_slices]

    def computed_bytes_of(self, unit: int) -> int:
        """Return the bytes that a unit has in memory from its rows on."""
        return self.computed_bytes[unit % self.num_slices]

    def place(self, pair: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the layer, the expert and the columns [start, stop) of a (layer, unit)."""
        layer, unit = pair
        expert, slice_index = slice_of(unit, self.num_slices)
        columns = self.bounds[slice_index]
        return layer, expert, columns.start, columns.stop
