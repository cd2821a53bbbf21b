"""Serves, loses a host and changes its topology in one process without Ray, under an audit hook; prints what was seen.

The hook is armed after a first request: until then modules are imported, which executes code. An event that would make
code of bytes, or start a process, is a finding, whichever thread it comes from.
"""

import json
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from anyio.from_thread import start_blocking_portal

from cluster.data_plane.attention_worker import AttentionWorker
from cluster.data_plane.expert_host import ExpertHost
from cluster.planning.placement import HostSlot, place
from cluster.ray_engine import read_geometry
from cluster.worker import HostAddress, Location, Role, Topology, WorkerConfig
from llama4_dist.client import Client
from llama4_dist.engine.options import EngineOptions
from llama4_dist.gateway.run import running_gateway
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from llama4_dist.rpc.remote_engine import RemoteEngine

HERE = Location(node="here", address="127.0.0.1")
FORBIDDEN = frozenset(
    {"pickle.find_class", "marshal.loads", "exec", "compile", "os.system", "os.exec", "subprocess.Popen"}
)
PROMPT = (1, 2, 3, 4, 5)


def main() -> None:
    model_dir, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
    seen: list[str] = []
    armed = threading.Event()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in FORBIDDEN and armed.is_set():
            seen.append(f"{event} {str(arguments)[:120]}")

    sys.addaudithook(hook)
    with ExitStack() as resources:
        hosts = {f"expert-{index}": start_host(model_dir, run_dir, index, resources) for index in range(3)}
        worker = AttentionWorker(config(model_dir, run_dir, Role.ATTENTION, 0), HERE)
        resources.callback(worker.close)
        worker.load()
        publish(worker, model_dir, hosts, ["expert-0", "expert-1"], epoch=1)
        engine = RemoteEngine(worker.serve(), secret=b"s" * 32)
        resources.callback(engine.close)
        portal = resources.enter_context(start_blocking_portal())
        gateway = running_gateway(engine, None, GatewaySettings(address="127.0.0.1:0"))
        port = resources.enter_context(portal.wrap_async_context_manager(gateway)).port
        client = resources.enter_context(Client(f"127.0.0.1:{port}"))
        greedy = Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
        expected = client.generate(PROMPT, greedy).token_ids
        armed.set()
        if "--prove" in sys.argv:  # that the hook sees what it is there for
            exec("1 + 1")
        stream = client.stream_generate(PROMPT, greedy)
        got: list[int] = []
        for number, delta in enumerate(stream):
            got += delta.token_ids
            if number == 5:
                publish(worker, model_dir, hosts, ["expert-0", "expert-1", "expert-2"], epoch=2)
            if number == 12:
                hosts["expert-0"][0].close()  # dies: others have copies, or map what it held
            if number == 20:
                publish(worker, model_dir, hosts, ["expert-1", "expert-2"], epoch=3)
        assert tuple(got) == expected, "tokens changed"
        armed.clear()
    print(json.dumps(seen))


def config(model_dir: Path, run_dir: Path, role: Role, index: int) -> WorkerConfig:
    return WorkerConfig(
        worker=f"{role}-{index}", role=role, model_dir=model_dir, dtype="auto", device="cpu", num_threads=1,
        run_dir=run_dir, secret=b"s" * 32, options=EngineOptions(num_blocks=64, max_num_seqs=8), cross_check_every=4,
    )  # fmt: skip


def start_host(model_dir: Path, run_dir: Path, index: int, resources: ExitStack) -> tuple[ExpertHost, HostAddress]:
    host = ExpertHost(config(model_dir, run_dir, Role.EXPERT, index), HERE)
    resources.callback(host.close)
    return host, host.load([])


def publish(
    worker: AttentionWorker,
    model_dir: Path,
    hosts: dict[str, tuple[ExpertHost, HostAddress]],
    names: list[str],
    *,
    epoch: int,
) -> None:
    """Give the named hosts what a placement with two copies gives them, and let the worker switch."""
    slots = [HostSlot(host=name, node="here") for name in names]
    placement = place(read_geometry(model_dir, "auto"), slots, num_replicas=2)
    for name in names:
        hosts[name][0].add(placement.held_by(name))
    addresses = {name: hosts[name][1] for name in names}
    worker.publish(Topology(epoch=epoch, placement=placement, hosts=addresses))


if __name__ == "__main__":
    main()
