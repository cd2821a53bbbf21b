"""What several files of tests stand on: a small model, a Ray of their own, an admin server; threads may just end."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from llama4_dist.client.admin import AdminClient
from tests.checkpoints import make_checkpoint
from tests.cluster.admin_serving import ONCE, Served, admin_serving
from tests.cluster.memory_control import MemoryControl


@pytest.fixture(scope="session", autouse=True)
def threads_may_exit() -> None:
    """Let the threads of a fake controller end as those of a killed process do: by SystemExit."""
    hook = threading.excepthook
    # Stays in place: some of them look up only after the last test. pytest takes its own hook away at the end.
    threading.excepthook = lambda args: None if args.exc_type is SystemExit else hook(args)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray for the tests of one file; its sockets lie in a folder of its own, for others run clusters here too."""
    from cluster.driver.launch import ensure_ray  # only tests that ask for a Ray pay for its import

    tmp_path_factory.getbasetemp()  # pytest's own folder stays where it is
    with tempfile.TemporaryDirectory(prefix="l4-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        session = ensure_ray()
        yield
        session.close()


@pytest.fixture
def control() -> MemoryControl:
    return MemoryControl()


@pytest.fixture
def served(control: MemoryControl) -> Iterator[Served]:
    """An admin server of `control`."""
    with admin_serving(control) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[AdminClient]:
    with AdminClient(served.address, ONCE) as connected:
        yield connected


@pytest.fixture
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address) as opened:
        yield opened
