"""Progress bars on stderr for work that takes long; silent when the output is for scripts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama4_dist.cli.output import error_console


@contextmanager
def byte_progress(title: str, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (bytes done, bytes in all) that moves a bar with rate and time left."""
    with _bars(show, DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()) as advance:
        yield lambda done, total: advance(title, done, total)


@contextmanager
def loading_progress(*, show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of (worker, tensors done, tensors in all) that keeps one bar a worker."""
    with _bars(show, MofNCompleteColumn(), TextColumn("tensors")) as advance:
        yield advance


@contextmanager
def _bars(show: bool, *columns: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    bars: dict[str, TaskID] = {}
    with Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), *columns, console=error_console, disable=not show
    ) as progress:

        def advance(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done, total=total)

        yield advance
