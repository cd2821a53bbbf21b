"""Checks an engine whose experts are in other processes on the same device, and times the way there and back."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu_checks.harness import Session, normal

if TYPE_CHECKING:
    from gpu_checks.host_client import HostProcess
    from llama4_dist.engine.local import LocalEngine

NUM_TOKENS = 12  # of each request
LENGTHS = (1, 9, 40, 17, 70, 30)  # of prompts
VOCABULARY = 256
MOVE_AT = 9  # the step before which experts change their hosts
WIDTH, EXPERT_WIDTH = 5120, 8192  # Scout's
NUMS_ROWS = (1, 16, 256)
REPEATS = 40
HOSTS = ("e0", "e1")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_hosts(session: Session) -> None:
    """Greedy tokens over two hosts, one host, and while experts move; then round trips of rows of Scout's width."""
    try:
        import msgpack  # noqa: F401
        import psutil  # noqa: F401
        import xxhash  # noqa: F401
    except ImportError as error:
        session.add("hosts", "skipped", note=f"it needs more than the kernels do: {error}")
        return
    from gpu_checks.host_client import HostProcess
    from tests.checkpoints import make_checkpoint

    device = str(session.device)
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="l4d")))
        path, run_dir = make_checkpoint(folder / "model", "scout", num_hidden_layers=4), folder / "run"
        processes = {name: HostProcess("experts", name, str(path), str(run_dir), device) for name in HOSTS}
        timing = HostProcess("timing", str(folder / "timing"), device) if session.is_cuda else None
        for process in (*processes.values(), *([timing] if timing else [])):
            resources.callback(process.close)
        if timing:
            timing.ask("load", WIDTH, EXPERT_WIDTH, "timed")  # it compiles while tokens are compared
        hosts = TwoHosts(path, device, processes)
        _check_float32(session, hosts)
        _check_bfloat16(session, hosts)
        if timing:
            time_round_trips(session, tuple(timing.answer()))


class TwoHosts:
    """The processes, told to load experts in both dtypes, and engines over them."""

    def __init__(self, path: Path, device: str, processes: Mapping[str, "HostProcess"]) -> None:
        from llama4_dist.checkpoint.reader import Checkpoint
        from llama4_dist.engine.options import EngineOptions
        from tests.gpu.unix_hosts import spread

        self.path, self.device = path, device
        self._processes = processes
        self.options = EngineOptions(
            num_blocks=400, max_num_seqs=8, max_num_batched_tokens=32, max_context=160, enable_prefix_caching=False
        )
        self._checkpoint = Checkpoint.open(path)
        self.before = spread(self._checkpoint.config, HOSTS)
        self.after = spread(self._checkpoint.config, HOSTS, turned_by=1)
        self._addresses: dict[str, dict[str, tuple[str, int]]] = {}
        for name, process in processes.items():
            for dtype in DTYPES:
                process.ask("load", dtype, self.before[name])

    def engine(self, dtype: str) -> "LocalEngine":
        """Return an engine on the device over both; the first one waits until they have loaded."""
        from tests.gpu.unix_hosts import engine_over

        if not self._addresses:
            heard = {name: {dtype: process.answer() for dtype in DTYPES} for name, process in self._processes.items()}
            self._addresses = {dtype: {name: tuple(heard[name][dtype]) for name in HOSTS} for dtype in DTYPES}
        return engine_over(
            self._checkpoint,
            self._addresses[dtype],
            self.before,
            dtype=DTYPES[dtype],
            device=self.device,
            options=self.options,
        )

    def in_one_process(self, dtype: str, device: str, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return what an engine without hosts says."""
        from llama4_dist.engine.build import build_single_process

        engine = build_single_process(self.path, dtype=dtype, device=device, options=self.options)
        try:
            return _run(engine, prompts)
        finally:
            engine.close()

    def give(self, engine: "LocalEngine", epoch: int, pairs: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        """Have each host hold these pairs and no others, between two steps of a bfloat16 engine."""
        from tests.gpu.unix_hosts import table_of

        dispatcher = engine.core.runner.dispatcher
        incarnations = {name: incarnation for name, (_, incarnation) in self._addresses["bfloat16"].items()}
        self._tell("add", pairs)
        table = table_of(self._checkpoint.config, pairs, incarnations, epoch=epoch)
        dispatcher.switch(table, dispatcher.links)
        self._tell("keep", pairs)

    def _tell(self, command: str, pairs: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        for name, process in self._processes.items():
            process.ask(command, "bfloat16", pairs.get(name, ()))
            process.answer()


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(23)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def _compare(session: Session, what: str, found: Sequence[list[int]], wanted: Sequence[list[int]]) -> None:
    num_equal = sum(a == b for a, b in zip(found, wanted, strict=True))
    session.add(f"hosts: {what}", num_equal == len(wanted), note=f"{num_equal} of {len(wanted)} requests equal")


def _check_float32(session: Session, hosts: TwoHosts) -> None:
    prompts = _prompts()
    expected = hosts.in_one_process("float32", "cpu", prompts)
    engine = hosts.engine("float32")
    _compare(session, "tokens of the processor's engine, float32", _run(engine, prompts), expected)
    engine.close()


def _check_bfloat16(session: Session, hosts: TwoHosts) -> None:
    prompts, engine = _prompts(), hosts.engine("bfloat16")
    together = _run(engine, prompts)
    alone = [_run(engine, [prompt])[0] for prompt in prompts]
    _compare(session, "tokens in company are those alone, bfloat16", together, alone)
    moved = _run(engine, prompts, at_step={MOVE_AT: lambda: hosts.give(engine, 2, hosts.after)})
    _compare(session, "tokens while experts move, bfloat16", moved, alone)
    hosts.give(engine, 3, {"e0": [pair for pairs in hosts.before.values() for pair in pairs]})
    _compare(session, "tokens over one host, bfloat16", _run(engine, prompts), alone)
    traffic = engine.core.runner.dispatcher.stats()
    note = f"refused {dict(traffic.refusals)}, late {traffic.late_replies}"
    session.add("hosts: nothing refused, nothing late", not traffic.refusals and not traffic.late_replies, note=note)
    engine.close()
    if session.is_cuda:
        in_one = hosts.in_one_process("bfloat16", hosts.device, prompts)
        _compare(session, "tokens of the engine on one device, bfloat16", in_one, alone)


@torch.inference_mode()
def _run(
    engine: "LocalEngine", prompts: Sequence[list[int]], *, at_step: Mapping[int, Callable[[], None]] | None = None
) -> list[list[int]]:
    """Return what the engine says after each prompt; they arrive one a step, so that prompts and decodes mix."""
    from llama4_dist.request import EngineRequest, Sampling, TokenOutput

    said: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    sampling = Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    waiting = [
        EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)
        for name, prompt in zip(said, prompts, strict=True)
    ]
    step = 0
    while waiting or engine.core.has_work:
        (at_step or {}).get(step, lambda: None)()
        step += 1
        if waiting:
            engine.core.add(waiting.pop(0), arrived_s=time.monotonic())
        for output in engine.core.step():
            assert isinstance(output, TokenOutput), output
            if output.error is not None:
                raise output.error
            said[output.request_id] += output.token_ids
    return list(said.values())


def time_round_trips(session: Session, address: tuple[Any, ...]) -> None:
    """From scored rows on the device to answers on the device, with experts and with rows given back as they are."""
    from gpu_checks.host_process import ECHO_LAYER, EXPERT_LAYER, NUM_EXPERTS
    from llama4_dist.dispatch.handshake import Hello
    from llama4_dist.dispatch.routing_table import Replica, RoutingTable
    from llama4_dist.gpu.host_rows import HostRows
    from llama4_dist.gpu.pinned import wait_for
    from tests.gpu.unix_hosts import dispatcher_over

    hello = Hello(
        role="attention",
        id="a0",
        incarnation=1,
        model_hash="timing",
        width=WIDTH,
        dtype="bfloat16",
        num_layers=2,
        num_experts=NUM_EXPERTS,
        arithmetic="timed",
    )
    whole = (Replica("timing", 1),)
    layers = {"links alone": ECHO_LAYER, f"through {NUM_EXPERTS} experts": EXPERT_LAYER}
    replicas = {(layer, expert): whole for layer in layers.values() for expert in range(NUM_EXPERTS)}
    dispatcher = dispatcher_over(
        hello, {"timing": address}, RoutingTable(epoch=1, replicas=replicas), device=str(session.device)
    )
    host_rows = HostRows(session.device)
    step = 0
    for num_rows in NUMS_ROWS:
        x_ND = normal(num_rows, WIDTH, device=session.device)
        experts_N = torch.arange(num_rows, dtype=torch.int32, device=session.device) % NUM_EXPERTS
        for what, layer in layers.items():
            out_ND, taken_s = torch.empty_like(x_ND), []
            for _ in range(REPEATS):
                step += 1
                dispatcher.begin_step(step)
                wait_for(session.device)
                started_s = time.perf_counter()
                in_flight = host_rows.dispatch(layer, x_ND, experts_N, dispatcher, 0)
                host_rows.combine(in_flight, dispatcher, out_ND)
                wait_for(session.device)
                taken_s.append(time.perf_counter() - started_s)
            if layer == ECHO_LAYER:
                session.add(f"hosts: {num_rows} rows come back as they went", torch.equal(out_ND, x_ND))
            seconds = statistics.median(taken_s[REPEATS // 4 :])
            session.add(f"hosts: round trip of {num_rows} rows, {what}", "measured", seconds=seconds)
    dispatcher.close()
