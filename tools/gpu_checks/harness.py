"""Times device work and keeps the table of results; knows no kernel."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line: relative error against float64, median time, achieved rate and its share of the ceiling."""

    check: str
    verdict: str
    error: float | None = None
    seconds: float | None = None
    rate: str = ""
    share: float | None = None
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Session:
    """The device, the measured ceilings, and what came out so far."""

    device: torch.device
    quick: bool
    stack_bytes: int
    rows: list[Row] = field(default_factory=list)
    copy_rate: float = 0.0  # bytes a second, read plus written
    matrix_rate: float = 0.0  # bfloat16 operations a second
    best: dict[str, Any] = field(default_factory=dict)

    started_s: float = field(default_factory=time.time)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def add(self, check: str, verdict: str | bool, **values: Any) -> None:
        """Keep and print a line."""
        words: dict[object, str] = {True: "ok", False: "FAIL"}
        row = Row(check=check, verdict=words.get(verdict, str(verdict)), **values)
        self.rows.append(row)
        print(format_row(row), flush=True)

    def run(self, name: str, check: Callable[["Session"], None]) -> None:
        """Run a check; what it raises becomes its line."""
        started_s = time.monotonic()
        print(f"--- {name}", flush=True)
        try:
            check(self)
        except Exception as error:  # noqa: BLE001 - the other checks go on
            print("".join(traceback.format_exception(error)[-6:])[-2500:], flush=True)
            self.add(name, "FAIL", note=f"{type(error).__name__}: {str(error)[:80]!r}")
        gc.collect()  # a model and its graphs point to each other
        if self.is_cuda and not self.is_broken():
            torch.cuda.empty_cache()
        print(f"    {name} took {time.monotonic() - started_s:.1f} s", flush=True)

    def is_broken(self) -> bool:
        """Whether the device answers no more: an illegal access stays with the process."""
        if not self.is_cuda:
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def seconds(self) -> float:
        return time.time() - self.started_s

    def load(self, state: dict[str, Any]) -> None:
        """Take over what an earlier process of this run measured."""
        self.rows = [Row(**row) for row in state["rows"]]
        self.copy_rate = state["copy_bytes_per_second"]
        self.matrix_rate = state["matrix_operations_per_second"]
        self.best, self.started_s = state["best"], state["started_s"]

    def as_json(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu (interpreter)",
            "torch": torch.__version__,
            "copy_bytes_per_second": self.copy_rate,
            "matrix_operations_per_second": self.matrix_rate,
            "best": self.best,
            "started_s": self.started_s,
            "rows": [asdict(row) for row in self.rows],
        }


HEADER = f"{'check':<58} {'error':>9} {'time':>10} {'rate':>16} {'share':>6}  verdict"


def format_row(row: Row) -> str:
    error = "" if row.error is None else f"{row.error:.2e}"
    seconds = "" if row.seconds is None else f"{row.seconds * 1e6:.1f} us"
    share = "" if row.share is None else f"{row.share:.0%}"
    return f"{row.check:<58} {error:>9} {seconds:>10} {row.rate:>16} {share:>6}  {row.verdict} {row.note}".rstrip()


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Return |out − expected| / |expected| in float64; NaN stays NaN."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def bench(functions: Sequence[Callable[[], Any]], *, repeats: int = 15) -> float:
    """Return median seconds of one of `functions`, which run after each other in a recorded graph.

    Pass several that touch different memory where one's inputs would stay in the cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    return replay_seconds(graph, repeats) / len(functions)


def replay_seconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Return the median seconds of a replay."""
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in events) / 1e3)


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Return random weights or rows, made on the device."""
    return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale)
