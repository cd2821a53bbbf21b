"""Writes safetensors files byte by byte, as no library would: the damaged inputs of the checkpoint tests."""

import json
from pathlib import Path
from typing import Any


def safetensors_bytes(header: Any, data: bytes = b"", *, header_bytes: int | None = None) -> bytes:
    """Return a file with `header` (bytes are taken as they are) that claims `header_bytes` of header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if header_bytes is None else header_bytes).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return (header, data) of a well-formed file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def edit_header(path: Path, edit: Any) -> None:
    """Rewrite the header of `path` after `edit(header)` changed it in place; the data stays."""
    header, data = split_file(path)
    edit(header)
    path.write_bytes(safetensors_bytes(header, data))
