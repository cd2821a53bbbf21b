"""Opens the engine of an `LLM`: in this process, or as a Ray cluster where expert hosts are asked for."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.port import Engine

Progress = Callable[[int, int], None]
NO_CLUSTER_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def open_engine(
    model_dir: Path,
    *,
    num_expert_hosts: int,
    num_attention_workers: int,
    options: EngineOptions,
    ray_address: str | None,
    progress: Progress | None,
    cluster: Mapping[str, Any] = NO_CLUSTER_OPTIONS,
    **build: Any,
) -> Engine:
    """Return an engine that is ready; `build` holds dtype, weights, device, num_threads, and how experts
    are cut and kept.

    `cluster` is more of `RayEngine`'s.
    """
    if num_expert_hosts == 0:
        return build_single_process(model_dir, options=options, progress=progress, **build)
    # Imported late: one process needs no Ray, and none is then imported.
    from cluster.ray_engine import RayEngine
    from cluster.worker import LoadProgress

    done_and_total: dict[str, tuple[int, int]] = {}

    def report(event: LoadProgress) -> None:
        if event.total and progress is not None:
            done_and_total[event.worker] = (event.done, event.total)
            progress(*map(sum, zip(*done_and_total.values(), strict=True)))

    return RayEngine(
        model_dir,
        num_expert_hosts=num_expert_hosts,
        num_attention_workers=num_attention_workers,
        options=options,
        ray_address=ray_address,
        progress=report,
        **cluster,
        **build,
    )


@contextmanager
def shown(progress: bool | Progress) -> Iterator[Progress | None]:
    """Yield the caller's own function of (done, total), or with True a bar on a terminal's stderr."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress or not sys.stderr.isatty():
        yield None
    else:
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True)) as bar:
            task = bar.add_task("Loading", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
