"""Fits how a time grows with a size: the slope of log time over log size, where the size is large."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

MIN_POINTS = 3
SUPER_LINEAR = 1.1  # above it a growth is called more than linear; a tenth is for noise and for caches that overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """time ~ size ^ exponent over the upper half of the sizes, with the standard error of the fit."""

    exponent: float
    error: float

    @property
    def is_super_linear(self) -> bool:
        """Whether the exponent is above the bound by more than its error."""
        return self.exponent - self.error > SUPER_LINEAR

    def __str__(self) -> str:
        return f"{self.exponent:.2f}±{self.error:.2f}"


def fit(sizes: Sequence[float], times: Sequence[float]) -> Growth:
    """Fit the points whose size is at least the geometric mean of the least and the largest size, three at least.

    Below it a constant part hides the growth. ValueError if there are fewer than three points or one is not positive.
    """
    if len(sizes) < MIN_POINTS or min(times) <= 0 or min(sizes) <= 0:
        raise ValueError(f"sizes {list(sizes)} and times {list(times)} cannot be fitted: give three, all above zero")
    points = sorted((math.log(x), math.log(y)) for x, y in zip(sizes, times, strict=True))
    edge = (points[0][0] + points[-1][0]) / 2 - 1e-9
    points = points[min(bisect_left(points, (edge,)), len(points) - MIN_POINTS) :]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    squares = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / squares
    residuals = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return Growth(exponent=slope, error=math.sqrt(residuals / (len(points) - 2) / squares))
