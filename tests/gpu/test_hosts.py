"""A decoder and expert hosts that compute by Triton's kernels say what the processor's say. In the interpreter."""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.reply_times import Deadlines
from llama4_dist.engine import devices
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.local import LocalEngine
from llama4_dist.errors import ConfigError, HandshakeError
from llama4_dist.gpu.decoder import GpuDecoder
from llama4_dist.gpu.experts import GpuExperts
from tests.checkpoints import make_checkpoint
from tests.gpu.test_engine import OPTIONS, tokens_of
from tests.gpu.unix_hosts import engine_over, new_host, spread, table_of

# topk2: two experts a token, and dense layers
PRESETS: dict[str, dict[str, Any]] = {"scout": {"num_hidden_layers": 4}, "topk2": {}}
PATIENT = Deadlines(
    unknown_hedge_s=60.0, unknown_lose_s=60.0, hedge_floor_s=60.0, lose_floor_s=60.0, lose_ceiling_s=60.0
)  # the interpreter takes a second for an answer
# Padding rows hold what the memory held before.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", params=PRESETS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **PRESETS[request.param])


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[str, list[int]]:
    engine = build_single_process(path, dtype="float32", options=OPTIONS)
    tokens = tokens_of(engine)
    engine.close()
    return tokens


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take Triton's kernels for any device: here the interpreter runs them on the processor's memory."""
    monkeypatch.setattr(devices, "is_triton", lambda dtype, device: True)


def test_the_kinds_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.arithmetic(torch.bfloat16, "cuda") == "triton-cuda"
    assert devices.arithmetic(torch.float16, "cuda") == "torch-cuda"
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert devices.arithmetic(torch.bfloat16, "cuda") == "torch-cuda"
    assert devices.arithmetic(torch.bfloat16, "cpu") != devices.arithmetic(torch.bfloat16, "cuda")


@pytest.mark.usefixtures("as_if_cuda")
def test_int8_is_refused(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    for load in (devices.load_model, devices.open_experts):
        with pytest.raises(ConfigError, match="int8"):
            load(checkpoint, dtype=torch.float32, device="cuda", weight_format="int8")


@pytest.mark.usefixtures("as_if_cuda")
def test_tokens_over_two_hosts_of_this_process(path: Path, expected: dict[str, list[int]]) -> None:
    engine = build_single_process(path, dtype="float32", num_inproc_hosts=2, options=OPTIONS)
    assert type(engine.core.runner.model) is GpuDecoder
    assert tokens_of(engine) == expected
    engine.close()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # short: a socket's path has to be
        yield Path(folder) / "run"


@pytest.fixture
def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hosts' threads take turns: the interpreter is no place for two."""
    launch, turn = interpreter.GridExecutor.__call__, threading.Lock()

    def launch_alone(self: object, *arguments: object, **options: object) -> None:
        with turn:
            launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_alone)


def over_sockets(path: Path, run_dir: Path, resources: ExitStack) -> LocalEngine:
    """Return an engine over two hosts, and have it move half of the experts after its second step."""
    checkpoint = Checkpoint.open(path)
    config, addresses = checkpoint.config, {}
    hosts = {name: new_host(name, path, run_dir, dtype="float32", device="cpu") for name in ("e0", "e1")}
    before, after = spread(config, tuple(hosts)), spread(config, tuple(hosts), turned_by=1)
    for name, host in hosts.items():
        resources.callback(host.close)
        address = host.load(before[name])
        assert type(host._held()._experts) is GpuExperts
        addresses[name] = (address.unix, address.incarnation)
    options = replace(OPTIONS, num_microbatches=2)
    engine = engine_over(
        checkpoint, addresses, before, dtype=torch.float32, device="cpu", options=options, deadlines=PATIENT
    )
    resources.callback(engine.close)
    step, dispatcher = engine.core.runner.finish, engine.core.runner.dispatcher
    num_steps = 0

    def step_and_move(spans: Any, submitted: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 2:
            for name, host in hosts.items():
                host.add(after[name])
            incarnations = {name: incarnation for name, (_, incarnation) in addresses.items()}
            dispatcher.switch(table_of(config, after, incarnations, epoch=2), dispatcher.links)
            for name, host in hosts.items():
                host.keep(after[name])
                assert host._held().holds == set(after[name])
        return step(spans, submitted)

    engine.core.runner.finish = step_and_move  # type: ignore[method-assign]
    return engine


@pytest.mark.usefixtures("as_if_cuda", "one_kernel_at_a_time")
def test_tokens_over_sockets_in_two_parts_while_experts_move(
    path: Path, run_dir: Path, expected: dict[str, list[int]]
) -> None:
    with ExitStack() as resources:
        engine = over_sockets(path, run_dir, resources)
        assert tokens_of(engine) == expected
        assert engine.core.runner.dispatcher.stats().refusals == {}


def test_a_worker_of_the_processor_is_refused(path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(path)
    with ExitStack() as resources, monkeypatch.context() as patch:
        patch.setattr(devices, "is_triton", lambda dtype, device: True)
        host = new_host("e0", path, run_dir, dtype="float32", device="cpu")
        resources.callback(host.close)
        address = host.load([(checkpoint.config.moe_layer_ids[0], 0)])
        patch.undo()
        with pytest.raises(HandshakeError) as caught:
            engine_over(
                checkpoint,
                {"e0": (address.unix, address.incarnation)},
                {},
                dtype=torch.float32,
                device="cpu",
                options=OPTIONS,
            )
        assert caught.value.reason == "ARITHMETIC_DIFFERS"
