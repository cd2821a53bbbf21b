"""How experts of one model are cut into slices: where each lies in its expert, and what it takes. Holds no weights."""

from dataclasses import dataclass

import torch

from llama4_dist.checkpoint.expert_slices import slice_bounds
from llama4_dist.config import ModelConfig
from llama4_dist.dispatch.units import slice_of
from llama4_dist.errors import ConfigError
from llama4_dist.model.weight_format import expert_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCut:
    """Columns and bytes of each slice, the same for all experts."""

    bounds: tuple[range, ...]
    slice_bytes: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, *, dtype: torch.dtype, weight_format: str, num_slices: int) -> "ExpertCut":
        """Cut the experts of a model; ConfigError where that cannot be."""
        try:
            bounds = slice_bounds(config.expert_width, num_slices)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        sizes = (expert_bytes(config, dtype=dtype, weight_format=weight_format, num_columns=len(one)) for one in bounds)
        return cls(bounds=bounds, slice_bytes=tuple(sizes))

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
        """Return the bytes of a unit's weights as they are multiplied."""
        return self.slice_bytes[unit % self.num_slices]

    def place(self, pair: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the layer, the expert and the columns [start, stop) of a (layer, unit)."""
        layer, unit = pair
        expert, slice_index = slice_of(unit, self.num_slices)
        columns = self.bounds[slice_index]
        return layer, expert, columns.start, columns.stop
