"""Reads JSON objects as strictly as the format allows; what two readers could understand differently is refused.

Duplicate keys (one reader takes the first, another the last), NaN and Infinity (no JSON), and nesting deeper than the
interpreter's stack are errors. The caller has bounded the size.
"""

import json
from typing import Any

from llama4_dist.checkpoint.fault import fault, shown


def parse_object(raw: bytes, file: str) -> dict[str, Any]:
    """Return the one JSON object that `raw` holds, or raise CheckpointError naming `file`."""
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise fault(file, "is nested too deeply to be a checkpoint's JSON") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, oversized integers, the two hooks below
        raise fault(file, f"is no valid JSON ({shown(str(error))}): download the file again") from None
    if not isinstance(content, dict):
        raise fault(file, f"holds a JSON {type(content).__name__} where an object is expected")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(key)} appears twice")
            seen.add(key)
    return content


def _no_constant(literal: str) -> None:
    raise ValueError(f"{literal} is no JSON number")
