"""How a benchmark's figures leave: JSON first, then a table; pictures are drawn by `bench.plot`."""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llama4_dist.cli.output import console, error_console, print_json
from llama4_dist.version import __version__

STDOUT = Path("-")


def write(file: Path | None, benchmark: str, settings: Mapping[str, object], results: object) -> bool:
    """Write the document where it was asked for; return whether a table may be shown beside it."""
    if file is None:
        return True
    document = {
        "benchmark": benchmark,
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": psutil.cpu_count(), "processor": platform.machine(), "load": psutil.getloadavg()},
        "settings": dict(settings),
        "results": results,
    }
    if file == STDOUT:
        print_json(document)
        return False
    file.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    return True


def show_columns(title: str, names: Sequence[str], results: Sequence[Mapping[str, Any]], head: str) -> None:
    """Show one column per result under its `head`, one line per metric."""
    table = Table(title=title, title_justify="left")
    table.add_column(head, style="bold")
    for result in results:
        table.add_column(shown(result[head]), justify="right")
    for name in names:
        table.add_row(name, *(shown(result.get(name)) for result in results))
    console.print(table)


def shown(value: object) -> str:
    """Format a figure with three or so digits."""
    if value is None:
        return "–"
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


@contextmanager
def counting(title: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function of the number done that moves a bar on a terminal's stderr."""
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=error_console,
        disable=quiet or not error_console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
