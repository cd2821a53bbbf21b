"""The gated feed-forward network of dense layers and of the shared expert."""

from torch import Tensor

from llama4_dist.model.activation import swiglu
from llama4_dist.model.linear import linear
from llama4_dist.model.weights import Weights


class FeedForward:
    """down(silu(gate x) · up x); gate and up are stored as one matrix. Source: transformers `Llama4TextMLP`."""

    def __init__(self, prefix: str, weights: Weights) -> None:
        self.gate_up_weight = weights.linear(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        self.down_weight = weights.linear(f"{prefix}.down_proj.weight")

    def __call__(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = linear(x_TD, self.gate_up_weight).chunk(2, dim=-1)
        return linear(swiglu(gate_TF, up_TF), self.down_weight)
