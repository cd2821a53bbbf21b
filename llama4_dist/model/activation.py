"""The logistic function and the gated SiLU, with the same bits wherever in a tensor an element lies.

torch's own float32 `sigmoid` and `silu` use another formula for the elements left over by vector code (4 % of them
differ in the last bit), and which elements those are depends on the number of rows and of threads. Its `exp` has one
formula; negation, addition and division are exactly rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)) in float32."""
    return torch.neg(x.float()).exp_().add_(1.0).reciprocal_()


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) · up."""
    if gate_TF.dtype != torch.float32:
        return F.silu(gate_TF) * up_TF  # float32 inside; rounding to 8 bits hides the last ones of 24
    divisor_TF = torch.neg(gate_TF).exp_().add_(1.0)
    return torch.div(gate_TF, divisor_TF, out=divisor_TF).mul_(up_TF)
