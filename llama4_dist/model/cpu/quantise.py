"""Makes int8 weights of stored ones, and says how far they are from those. Knows no checkpoint.

The same stored weight gives the same bytes on every processor, whoever quantises it.
"""

import threading

import torch
from torch import Tensor

from llama4_dist.model.cpu.panels import NAME_OF, Panels
from llama4_dist.native import threads
from llama4_dist.native.bindings import passes

_SCALE_BYTES = 4


class QuantisationError:
    """What the outputs quantised so far lost: the worst and the mean relative error, where 0.01 is one in a hundred.

    An output's relative error is the root of the summed squares of what its weights lost, over the same of its weights.
    """

    def __init__(self) -> None:
        self.num_outputs = 0
        self.worst = 0.0
        self._sum = 0.0
        self._adding = threading.Lock()  # a fingerprint may quantise beside the thread that computes

    @property
    def mean(self) -> float:
        """The mean over all outputs; 0 where there are none."""
        return self._sum / self.num_outputs if self.num_outputs else 0.0

    def add(self, errors_F: Tensor) -> None:
        """Take in the relative errors of some outputs [F]."""
        with self._adding:
            self.num_outputs += len(errors_F)
            self.worst = max(self.worst, float(errors_F.max()))
            self._sum += float(errors_F.sum(dtype=torch.float64))

    def __str__(self) -> str:
        """Write it as fields of a log line."""
        return f"outputs={self.num_outputs} worst={self.worst:.4f} mean={self.mean:.4f}"


def quantise(weight_DF: Tensor, error: QuantisationError) -> Panels:
    """Pack an input-major weight as int8 with a float32 scale an output; `error` learns what was lost.

    Each weight is off by half of its output's scale at most.
    """
    native = passes()
    assert native is not None, "asked to quantise without native passes"
    if weight_DF.dtype not in NAME_OF:
        weight_DF = weight_DF.float()  # float16: exact
    if weight_DF.stride(1) != 1:
        weight_DF = weight_DF.contiguous()
    num_inputs, num_outputs = weight_DF.shape
    strip = native.l4d_strip()
    num_strips = -(-num_outputs // strip)
    num_values = num_strips * num_inputs * strip
    memory = torch.zeros(num_values + num_strips * strip * _SCALE_BYTES, dtype=torch.int8)
    errors_F = torch.empty(num_outputs)
    run = getattr(native, f"l4d_quantise_{NAME_OF[weight_DF.dtype]}")
    shape = (weight_DF.stride(0), num_inputs, num_outputs)
    run(weight_DF.data_ptr(), *shape, memory.data_ptr(), errors_F.data_ptr(), threads.count())
    error.add(errors_F)
    return Panels(
        strips=memory[:num_values].view(num_strips, num_inputs, strip),
        num_outputs=num_outputs,
        scales_F=memory[num_values:].view(torch.float32)[:num_outputs],
    )
