"""Numbers expert slices: slice s of expert e is unit e · num_slices + s, which is what is placed, sent to and lost.

Below `Dispatcher.dispatch` a unit is all there is: what frames, layouts and routes call an expert is one. Where experts
are whole, units are experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertSlice(NamedTuple):
    """One slice of an expert's width."""

    expert: int
    slice_index: int


def slice_of(unit: int, num_slices: int) -> ExpertSlice:
    """Return which slice of which expert a unit is."""
    return ExpertSlice(*divmod(unit, num_slices))


def name_of(unit: int, num_slices: int) -> str:
    """Return a unit's name for people: "3", or "3.1" for the second slice of expert 3 where experts are cut."""
    expert, slice_index = slice_of(unit, num_slices)
    return str(expert) if num_slices == 1 else f"{expert}.{slice_index}"


def expand(experts_TK: Tensor, scores_TK: Tensor, num_slices: int) -> tuple[Tensor, Tensor]:
    """Turn each copy into one per slice of its expert: units and scores [T, K · num_slices], slices innermost.

    Every slice reads the same scaled row. Added in this order, copies are added slot by slot and in a slot slice by
    slice.
    """
    num_tokens, num_slots = experts_TK.shape
    slices = torch.arange(num_slices, device=experts_TK.device)
    units_TK = (experts_TK.unsqueeze(2) * num_slices + slices).view(num_tokens, num_slots * num_slices)
    return units_TK, scores_TK.repeat_interleave(num_slices, dim=1)
