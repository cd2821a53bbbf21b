"""Typed, bounded access to the keys of a config file; knows nothing of models.

A missing key is an error unless the caller passes a default, so that no default can replace a published value
unnoticed. `null` counts as missing.
"""

import math
from collections.abc import Mapping
from typing import Any

from llama4_dist.checkpoint.fault import fault, shown
from llama4_dist.errors import CheckpointError

REQUIRED: Any = object()


class Fields:
    """The keys of one JSON object of `file`; `prefix` ("text_config.") goes before a key's name in errors."""

    def __init__(self, content: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self._content = content
        self._file = file
        self._prefix = prefix

    def fault(self, key: str, cause: str) -> CheckpointError:
        return fault(self._file, f"{self._prefix}{key} {cause}")

    def find(self, key: str, default: Any = REQUIRED) -> Any:
        """Return the raw value of `key`, whatever its type."""
        value = self._content.get(key)
        if value is None:
            if default is REQUIRED:
                raise self.fault(key, "is missing")
            return default
        return value

    def integer(self, key: str, *, minimum: int, maximum: int, default: Any = REQUIRED) -> int:
        value = self.find(key, default)
        if value is default:
            return value  # type: ignore[no-any-return]
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.fault(key, f"is {shown(value)}; an integer from {minimum} to {maximum} is expected")
        return value

    def number(self, key: str, *, above: float, maximum: float, default: Any = REQUIRED) -> float:
        """Return a finite number in (above, maximum]."""
        value = self.find(key, default)
        if value is default:
            return value  # type: ignore[no-any-return]
        # The bound comes first: an integer beyond float's range would overflow in isfinite.
        if type(value) not in (int, float) or not above < value <= maximum or not math.isfinite(value):
            raise self.fault(key, f"is {shown(value)}; a number above {above:g} and up to {maximum:g} is expected")
        return float(value)

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        value = self.find(key, default)
        if type(value) is not bool:
            raise self.fault(key, f"is {shown(value)}; true or false is expected")
        return value

    def string(self, key: str, default: Any = REQUIRED) -> str:
        value = self.find(key, default)
        if not isinstance(value, str):
            raise self.fault(key, f"is {shown(value)}; a string is expected")
        return value

    def integers(self, key: str, *, minimum: int, maximum: int, default: Any = REQUIRED) -> tuple[int, ...]:
        """Return a list of integers, or the one integer that stands in its place."""
        value = self.find(key, default)
        if value is default:
            return value  # type: ignore[no-any-return]
        values = [value] if type(value) is int else value
        if not isinstance(values, list) or not all(type(v) is int and minimum <= v <= maximum for v in values):
            raise self.fault(key, f"is {shown(value)}; integers from {minimum} to {maximum} are expected")
        return tuple(values)

    def section(self, key: str) -> "Fields":
        """Return the object under `key`."""
        value = self.find(key)
        if not isinstance(value, dict):
            raise self.fault(key, f"is {shown(value)}; an object is expected")
        return Fields(value, self._file, f"{self._prefix}{key}.")

    def keys(self) -> tuple[str, ...]:
        """Return the keys that stand here, those with null included."""
        return tuple(self._content)

    def has(self, key: str) -> bool:
        return self._content.get(key) is not None
