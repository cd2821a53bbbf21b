"""One nursery and one tiny model for all of the matrix; a cluster of its own for each test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from llama4_dist.chaos.history.events import read_file
from llama4_dist.chaos.history.reference import Reference
from llama4_dist.request import EngineRequest
from tests.checkpoints import make_checkpoint
from tests.cluster.running import reference, some_requests
from tests.matrix.harness import Cluster, Spec
from tests.matrix.hosts import Nursery
from tests.matrix.load import reference_of

MAX_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Requests, greedy and seeded in turn, and what one process without faults answers."""

    requests: tuple[EngineRequest, ...]
    reference: Reference


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as one:
        yield one


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")


@pytest.fixture(scope="session")
def cases(nursery: Nursery, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """The answers are those of one process; the usual gaps those of a healthy cluster, warm-up left out."""
    requests = some_requests("r", count=6, max_tokens=MAX_TOKENS)
    said = reference(model_dir, requests)
    answers = reference_of(requests, [said[request.request_id] for request in requests])
    with ExitStack() as stack:
        run_dir = tmp_path_factory.mktemp("m") / "run"
        cluster = Cluster(nursery, Spec(), model_dir=model_dir, run_dir=run_dir, resources=stack).start()
        load = cluster.load(requests, answers).start()
        load.wait_for_ends(4)
        load.end()
        events = read_file(load.history.path)
    warm = [event for event in events if int(event.request_id.rpartition("-")[2]) >= len(requests)]
    return Cases(requests=tuple(requests), reference=replace(answers, events=warm))


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make(
    nursery: Nursery, model_dir: Path, tmp_path_factory: pytest.TempPathFactory, resources: ExitStack
) -> Callable[..., Cluster]:
    """Make a cluster of `Spec(**options)`; its workers are not started yet."""

    def make_one(**options: Any) -> Cluster:
        run_dir = tmp_path_factory.mktemp("m") / "run"  # a short name: paths of Unix sockets are bounded
        return Cluster(nursery, Spec(**options), model_dir=model_dir, run_dir=run_dir, resources=resources)

    return make_one
