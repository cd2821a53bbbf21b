"""Root-mean-square normalisation, with a learned weight or without one."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension in float32, cast back, and only then multiply by the weight.

    Source: transformers `Llama4TextRMSNorm`; without a weight it is `Llama4TextL2Norm`, the QK-norm.
    """
    normed_TD = F.rms_norm(x_TD, x_TD.shape[-1:], None, eps)
    return normed_TD if weight_D is None else normed_TD * weight_D
