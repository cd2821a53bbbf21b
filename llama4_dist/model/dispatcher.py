"""What a model asks of whoever reaches the experts; knows no hosts and no links."""

from typing import Any, Protocol

from torch import Tensor


class Dispatcher(Protocol):
    """`dispatch.Dispatcher` is one."""

    def begin_step(self, step: int) -> None: ...

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor, microbatch: int = 0) -> Any: ...

    def combine(self, in_flight: Any) -> Tensor: ...
