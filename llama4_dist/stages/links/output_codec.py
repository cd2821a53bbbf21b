"""What a stage made of a part as bytes, and back: rows or logits raw behind a header, or an error.

msgpack [step, microbatch, [[host, wrong answers], ...], [dtype, rows, columns] or [kind, reason, message, seconds]]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import torch
from torch import Tensor

from llama4_dist.errors import Llama4Error
from llama4_dist.stages.links.defect import defect
from llama4_dist.stages.links.errors import error_from_wire, error_to_wire
from llama4_dist.stages.ports import StageOutput

MAX_HOSTS = 4096
_MAX_HOST_NAME = 128
_DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_NUMBER = 1 << 62
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRules:
    """What may come: `width` values in each of at most `max_rows` rows."""

    width: int
    max_rows: int

    @property
    def max_payload_bytes(self) -> int:
        return self.max_rows * self.width * 4


class OutputHeader(NamedTuple):
    """A header, checked; `rows` is memory for the payload, or an error."""

    step: int
    microbatch: int
    rows: Tensor | Llama4Error
    wrong_answers: dict[str, int]

    @property
    def payload(self) -> memoryview:
        """Where the payload has to be received."""
        return bytes_of(self.rows) if isinstance(self.rows, Tensor) else _NOTHING

    def output(self, device: torch.device | str) -> StageOutput:
        """Return the output, once its payload is there."""
        rows = self.rows.to(device) if isinstance(self.rows, Tensor) else self.rows
        return StageOutput(step=self.step, microbatch=self.microbatch, rows=rows, wrong_answers=self.wrong_answers)


def encode_output(output: StageOutput) -> tuple[bytes, memoryview]:
    """Write an output: its header, and the bytes to send behind it. Rows on a device are brought here."""
    payload = _NOTHING
    body: tuple[Any, ...]
    if isinstance(output.rows, Tensor):
        rows = output.rows.detach().cpu().contiguous()
        body, payload = (_CODES[rows.dtype], *rows.shape), bytes_of(rows)
    else:
        body = error_to_wire(output.rows)
    return msgpack.packb((output.step, output.microbatch, list(output.wrong_answers.items()), body)), payload


def decode_output(
    received: bytes | bytearray, payload_len: int, rules: OutputRules, *, empty: Callable[..., Tensor] = torch.empty
) -> OutputHeader:
    """Read a header and take memory for the payload, once its size is known to be right; FrameError."""
    try:
        step, microbatch, wrong, body = msgpack.unpackb(
            received, max_str_len=1024 * 4, max_bin_len=0, max_array_len=MAX_HOSTS, max_map_len=0, max_ext_len=0
        )
        counts = dict(_wrong_answer(*one) for one in wrong)
        rows = _rows(body, payload_len, rules, empty) if len(body) == 3 else _error(body, payload_len)
        return OutputHeader(_number(step), _number(microbatch), rows, counts)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise defect("OUTPUT_SHAPE", f"an output is not as it must be: {type(error).__name__}") from None


def bytes_of(rows: Tensor) -> memoryview:
    """Return the bytes of a tensor in one piece, which may be written."""
    return rows.view(-1).view(torch.uint8).numpy().data


def _rows(body: Any, payload_len: int, rules: OutputRules, empty: Callable[..., Tensor]) -> Tensor:
    code, num_rows, width = (_number(value) for value in body)
    if code not in _DTYPES or width != rules.width or num_rows > rules.max_rows:
        raise defect(
            "ROWS_WRONG",
            f"rows [{num_rows}, {width}] of dtype {code} came, where [≤ {rules.max_rows}, {rules.width}] are due",
        )
    dtype = _DTYPES[code]
    if payload_len != num_rows * width * dtype.itemsize:
        raise defect("PAYLOAD_LENGTH", f"{payload_len} bytes came for rows [{num_rows}, {width}] of {dtype}")
    return empty(num_rows, width, dtype=dtype)


def _error(body: Any, payload_len: int) -> Llama4Error:
    if payload_len:
        raise defect("PAYLOAD_LENGTH", f"{payload_len} bytes came behind an error")
    return error_from_wire(body)


def _wrong_answer(host: Any, count: Any) -> tuple[str, int]:
    if type(host) is not str or not 0 < len(host) <= _MAX_HOST_NAME:
        raise defect("HOST_NAME", "wrong answers of a host without a name came")
    return host, _number(count)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise defect("NUMBER_RANGE", "a number of an output is negative or too large")
    return value
