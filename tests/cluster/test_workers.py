"""Attention workers and expert hosts as plain objects in this process, over real Unix and TCP sockets."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.attention_worker import AttentionWorker
from cluster.expert_host import ExpertHost
from cluster.placement import HostSlot, place
from cluster.ray_engine import read_geometry
from cluster.worker import Location, Role, State, Topology, WorkerConfig
from llama4_dist.engine.group import EngineGroup
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError, HandshakeError, LinkDownError, UnavailableError
from llama4_dist.model.expert import Experts
from llama4_dist.rpc.remote_engine import RemoteEngine
from tests.checkpoints import make_checkpoint
from tests.cluster.running import Collector, Tokens, reference, some_requests

SECRET = b"s" * 32
HERE = Location(node="here", address="127.0.0.1")
ELSEWHERE = Location(node="elsewhere", address="127.0.0.1")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Tokens:
    return reference(model_dir, some_requests("r"))


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def config(model_dir: Path, run_dir: Path, role: Role, index: int, secret: bytes = SECRET) -> WorkerConfig:
    return WorkerConfig(
        worker=f"{role}-{index}", role=role, model_dir=model_dir, dtype="auto", device="cpu", num_threads=1,
        run_dir=run_dir, secret=secret, options=EngineOptions(num_blocks=64, max_num_seqs=8),
    )  # fmt: skip


def start_hosts(
    model_dir: Path, run_dir: Path, count: int, resources: ExitStack, *, locations: Sequence[Location] = (HERE,),
    num_replicas: int = 1,
) -> tuple[list[ExpertHost], Topology]:  # fmt: skip
    hosts = [
        ExpertHost(config(model_dir, run_dir, Role.EXPERT, index), locations[index % len(locations)])
        for index in range(count)
    ]
    slots = [HostSlot(host=f"expert-{index}", node=host.location().node) for index, host in enumerate(hosts)]
    placement = place(read_geometry(model_dir, "auto"), slots, num_replicas=num_replicas)
    addresses = {}
    for slot, host in zip(slots, hosts, strict=True):
        resources.callback(host.close)
        addresses[slot.host] = host.load(placement.held_by(slot.host))
    return hosts, Topology(epoch=1, placement=placement, hosts=addresses)


def start_attention(
    model_dir: Path, run_dir: Path, index: int, topology: Topology, resources: ExitStack
) -> tuple[AttentionWorker, RemoteEngine]:
    worker = AttentionWorker(config(model_dir, run_dir, Role.ATTENTION, index), HERE)
    resources.callback(worker.close)
    worker.load()
    worker.publish(topology)
    engine = RemoteEngine(worker.serve(), secret=SECRET)
    resources.callback(engine.close)
    return worker, engine


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 7, 16])
def test_any_number_of_hosts_gives_the_tokens_of_one_process(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack, num_hosts: int
) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", num_hosts, resources, locations=(HERE, ELSEWHERE))
    _, engine = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    collector = Collector()
    engine.start(collector.collect)
    assert collector.run(engine, some_requests("r")) == expected
    rows = engine.stats().host_rows
    assert rows.keys() == {f"expert-{index}" for index in range(num_hosts)}
    num_tokens = sum(len(r.prompt_token_ids) + r.sampling.max_tokens - 1 for r in some_requests("r"))  # type: ignore[operator]
    assert sum(rows.values()) == 4 * num_tokens, "each token of each of 4 MoE layers goes to one host once"
    assert sum(engine.stats().host_bytes_out.values()) == 4 * num_tokens * 64 * 4


def test_two_attention_workers_share_hosts(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack
) -> None:
    hosts, topology = start_hosts(model_dir, tmp_path / "run", 2, resources, num_replicas=2)
    pairs = [start_attention(model_dir, tmp_path / "run", index, topology, resources) for index in range(2)]
    group, collector = EngineGroup([engine for _, engine in pairs]), Collector()
    group.start(collector.collect)
    assert collector.run(group, some_requests("r")) == expected
    for host in hosts:
        assert host.stats().rows_by_worker.keys() == {"attention-0", "attention-1"}


def test_a_worker_dials_unix_on_its_own_node_and_tcp_elsewhere(
    model_dir: Path, tmp_path: Path, resources: ExitStack
) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", 2, resources, locations=(HERE, ELSEWHERE))
    worker, _ = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    families = {}
    for host, link in worker._links.items():
        with socket.fromfd(link.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as copy:
            families[host] = copy.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    assert families == {"expert-0": socket.AF_UNIX, "expert-1": socket.AF_INET}


def test_a_new_topology_is_adopted_between_steps_and_keeps_the_links_it_can(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack
) -> None:
    _, first = start_hosts(model_dir, tmp_path / "a", 2, resources)
    worker, engine = start_attention(model_dir, tmp_path / "a", 0, first, resources)
    before = dict(worker._links)
    collector = Collector()
    engine.start(collector.collect)
    for request in some_requests("r"):
        engine.submit(request)
    collector.wait_for_tokens("r0", 2)
    swapped = {pair: tuple(reversed(hosts)) for pair, hosts in first.placement.hosts_of.items()}
    same_hosts = Topology(epoch=2, placement=type(first.placement)(hosts_of=swapped), hosts=first.hosts)
    assert worker.publish(same_hosts) == 2
    assert worker._links == before
    assert worker.status().epoch == 2
    collector.wait_for([f"r{index}" for index in range(6)])
    assert {name: tuple(tokens) for name, tokens in collector.tokens.items()} == expected


def test_a_host_maps_only_what_it_is_given_and_says_so(model_dir: Path, tmp_path: Path, resources: ExitStack) -> None:
    (host, _), topology = start_hosts(model_dir, tmp_path / "run", 2, resources)
    status = host.status()
    assert status.state is State.READY
    assert status.experts == topology.placement.held_by("expert-0")
    assert len(status.experts) == 4 * 8
    assert host.progress().done == host.progress().total == 32
    assert status.addresses[0].startswith("unix:")
    assert status.addresses[1].startswith("tcp:127.0.0.1:")


def test_a_closed_host_leaves_neither_socket_file_nor_folder_nor_listener(
    model_dir: Path, tmp_path: Path, resources: ExitStack
) -> None:
    (host,), topology = start_hosts(model_dir, tmp_path / "run", 1, resources)
    worker, _ = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    address = topology.hosts["expert-0"]
    host.close()
    host.close()
    assert not (tmp_path / "run").exists()
    with pytest.raises(LinkDownError):
        worker._connect(address.tcp)
    assert host.status().state is State.LOST


def test_a_host_whose_arithmetic_fails_drops_its_links_and_says_so(
    model_dir: Path, tmp_path: Path, resources: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host,), topology = start_hosts(model_dir, tmp_path / "run", 1, resources)
    _, engine = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    collector = Collector()
    engine.start(collector.collect)

    def broken(*_arguments: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(Experts, "__call__", broken)
    with pytest.raises(UnavailableError) as caught:
        collector.run(engine, some_requests("r", count=1))
    assert caught.value.reason == "EXPERT_UNREACHABLE"
    assert host.status().state is State.LOST


def test_a_worker_of_another_cluster_is_refused(model_dir: Path, tmp_path: Path, resources: ExitStack) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", 1, resources)
    stranger = AttentionWorker(config(model_dir, tmp_path / "run", Role.ATTENTION, 0, secret=b"t" * 32), HERE)
    resources.callback(stranger.close)
    stranger.load()
    with pytest.raises((HandshakeError, LinkDownError)):
        stranger.publish(topology)


def test_a_worker_of_another_checkpoint_is_refused(model_dir: Path, tmp_path: Path, resources: ExitStack) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", 1, resources)
    other = make_checkpoint(tmp_path / "other", "scout", rope_theta=10000.0)
    stranger = AttentionWorker(config(other, tmp_path / "run", Role.ATTENTION, 0), HERE)
    resources.callback(stranger.close)
    stranger.load()
    with pytest.raises(HandshakeError, match="MODEL_HASH_DIFFERS"):
        stranger.publish(topology)


def test_a_dense_model_has_nothing_to_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no routed experts"):
        read_geometry(make_checkpoint(tmp_path, "dense"), "auto")
