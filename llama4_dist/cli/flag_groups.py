"""A command's flags as fields of dataclasses, so that commands which share flags say them once; knows no flag."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Any


def with_flag_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer a command with a flag for each field of the dataclasses that `command` takes.

    A field is annotated as typer wants a parameter, and its default is the flag's. Parameters of other types stay as
    they are. Two groups of one command may not have a field of the same name: Python refuses such a signature.
    """
    taken = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {one.name: one.annotation for one in taken if is_dataclass(one.annotation)}
    flags: list[inspect.Parameter] = []
    for one in taken:
        group = groups.get(one.name)
        flags += map(_flag, fields(group)) if group else [one.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    @wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **given)

    run.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    run.__annotations__ = {flag.name: flag.annotation for flag in flags}
    return run


def _flag(field: Field[Any]) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=field.type, default=default)
