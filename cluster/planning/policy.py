"""What an operator wants of a placement, as numbers; how it is reached is not decided here."""

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPolicy:
    """Copies wanted, and how far experts may move for the sake of load.

    With `require_replicas` a plan with fewer copies than `num_replicas` is refused, else it is made with a warning.
    `max_extra` is how many further copies a layer's hot experts may have together. An expert is hot while the load of
    each of its copies exceeds `hot_ratio` times that of an average copy, or the mean load of a host if that is less; 0
    gives all of `max_extra` away, as EPLB does.
    `rebalance` allows to move copies that could stay, where one exchange takes at least `min_gain` of the mean load off
    a layer's busiest host. `split` says that an expert's rows are spread over its copies; else they go to the first.
    """

    num_replicas: int = 1
    require_replicas: bool = False
    max_extra: int = 0
    hot_ratio: float = 1.25
    rebalance: bool = True
    min_gain: float = 0.01
    split: bool = False

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ValueError(f"num_replicas={self.num_replicas}: every expert needs at least 1 copy")
        if self.max_extra < 0:
            raise ValueError(f"max_extra={self.max_extra}: give 0 or more")
        if not (isfinite(self.hot_ratio) and self.hot_ratio >= 0):
            raise ValueError(f"hot_ratio={self.hot_ratio}: give a number from 0 (every expert is hot) up")
        if not (isfinite(self.min_gain) and self.min_gain > 0):
            raise ValueError(f"min_gain={self.min_gain}: an exchange must gain something; give more than 0")
