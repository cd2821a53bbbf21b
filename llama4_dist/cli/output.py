"""What commands show: tables for people, one JSON document for scripts, errors in colour and exit codes.

Exit codes: 0 done · 1 the work failed · 2 wrong usage or settings · 3 bad checkpoint · 4 server or cluster unavailable.
rich honours NO_COLOR and drops colours when the output is no terminal.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from llama4_dist.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    Llama4Error,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)

console = Console()
error_console = Console(stderr=True)

EXIT_FAILED, EXIT_USAGE, EXIT_CHECKPOINT, EXIT_UNAVAILABLE = 1, 2, 3, 4


def exit_code(error: Llama4Error) -> int:
    """Map an error to the process's exit code."""
    match error:
        case CheckpointError():
            return EXIT_CHECKPOINT
        case ConfigError() | InvalidRequestError() | NotFoundError():
            return EXIT_USAGE
        case UnavailableError() | OverloadedError():
            return EXIT_UNAVAILABLE
        case _:
            return EXIT_FAILED


def fail(message: str, *, reason: str, code: int, as_json: bool) -> NoReturn:
    """Report an error on stderr (or as JSON on stdout) and leave with `code`."""
    if as_json:
        print_json({"error": {"reason": reason, "message": message}})
    else:
        error_console.print("[bold red]error:[/]", end=" ")
        error_console.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Turn this project's errors into one line and an exit code; anything else is a defect and keeps its traceback."""
    try:
        yield
    except Llama4Error as error:
        fail(error.message, reason=error.reason, code=exit_code(error), as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@contextmanager
def until_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C be the ordinary end of a live view."""
    with suppress(KeyboardInterrupt):
        yield


def print_json(value: Any) -> None:
    """Write one JSON document to stdout, never wrapped or coloured."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def print_pairs(title: str, pairs: Mapping[str, object]) -> None:
    """Show a two-column table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, str(value))
    console.print(table)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Show a table; numbers are right-aligned."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    console.print(table)


def human_bytes(count: float) -> str:
    """Format a byte count in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
