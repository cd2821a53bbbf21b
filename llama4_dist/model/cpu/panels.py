"""A weight in the layout that the native passes stream: strips of some outputs, each contiguous."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_dist.native import threads
from llama4_dist.native.bindings import passes

NAME_OF = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # of rows, caches and weights as stored
WEIGHT_NAME_OF = {**NAME_OF, torch.int8: "int8", torch.float8_e4m3fn: "float8"}


def is_native(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Tell whether weights of this kind are multiplied by native passes."""
    return torch.device(device).type == "cpu" and dtype in NAME_OF and passes() is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panels:
    """A linear's weight [F, D] as [ceil(F / strip), D, strip]; the last strip is filled up with zeros.

    int8 and float8 strips have a scale an output, in the same memory behind them, where native passes look for them.
    """

    strips: Tensor
    num_outputs: int
    scales_F: Tensor | None = None

    @property
    def address(self) -> int:
        return self.strips.data_ptr()

    @property
    def num_inputs(self) -> int:
        return self.strips.shape[1]

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return x @ weightᵀ [T, F] in float32; x is float32 with contiguous rows."""
        assert x_TD.dtype == torch.float32, "activations are float32"
        assert x_TD.stride(1) == 1, "rows are not contiguous"
        assert x_TD.shape[1] == self.num_inputs, "rows and weight do not fit"
        y_TF = x_TD.new_empty(len(x_TD), self.num_outputs)
        native = passes()
        assert native is not None, "weights were packed without native passes"
        multiply = getattr(native, f"l4d_linear_{WEIGHT_NAME_OF[self.strips.dtype]}")
        multiply(
            x_TD.data_ptr(),
            x_TD.stride(0),
            len(x_TD),
            self.address,
            self.num_inputs,
            self.num_outputs,
            y_TF.data_ptr(),
            threads.count(),
        )
        return y_TF


def pack(weight_FD: Tensor) -> Panels:
    """Copy an output-major weight into panels of the same dtype."""
    native = passes()
    assert native is not None, "asked to pack without native passes"
    strip = native.l4d_strip()
    num_outputs, num_inputs = weight_FD.shape
    filled = F.pad(weight_FD, (0, 0, 0, -num_outputs % strip))
    strips = filled.reshape(-1, strip, num_inputs).transpose(1, 2).contiguous()
    return Panels(strips=strips, num_outputs=num_outputs)
