"""Attention workers and expert hosts as plain objects in this process, over real Unix and TCP sockets."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.data_plane.attention_worker import AttentionWorker
from cluster.data_plane.expert_host import ExpertHost
from cluster.data_plane.referee import Referee
from cluster.planning.placement import ExpertGeometry, HostSlot, place
from cluster.ray_engine import read_geometry
from cluster.worker import Location, Role, State, Topology, WorkerConfig
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.group import EngineGroup
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError, HandshakeError, LinkDownError, PreconditionError, UnavailableError
from llama4_dist.model.expert import Experts
from llama4_dist.rpc.remote_engine import RemoteEngine
from tests.checkpoints import make_checkpoint
from tests.cluster.running import Collector, Tokens, reference, some_requests
from tests.native.compiler import needs_compiler
from tests.waiting import wait_until

SECRET = b"s" * 32
HERE = Location(node="here", address="127.0.0.1")
ELSEWHERE = Location(node="elsewhere", address="127.0.0.1")


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Tokens:
    return reference(model_dir, some_requests("r"))


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def config(model_dir: Path, run_dir: Path, role: Role, index: int, secret: bytes = SECRET, **more: Any) -> WorkerConfig:
    return WorkerConfig(
        worker=f"{role}-{index}", role=role, model_dir=model_dir, dtype="auto", device="cpu", num_threads=1,
        run_dir=run_dir, secret=secret, options=EngineOptions(num_blocks=64, max_num_seqs=8, expert_timeout_s=2.0),
        **more,
    )  # fmt: skip


def start_hosts(
    model_dir: Path, run_dir: Path, count: int, resources: ExitStack, *, locations: Sequence[Location] = (HERE,),
    num_replicas: int = 1, **more: Any,
) -> tuple[list[ExpertHost], Topology]:  # fmt: skip
    hosts = [
        ExpertHost(config(model_dir, run_dir, Role.EXPERT, index, **more), locations[index % len(locations)])
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
    model_dir: Path, run_dir: Path, index: int, topology: Topology, resources: ExitStack, **more: Any
) -> tuple[AttentionWorker, RemoteEngine]:
    worker = AttentionWorker(config(model_dir, run_dir, Role.ATTENTION, index, **more), HERE)
    resources.callback(worker.close)
    worker.load()
    worker.connect(topology.hosts)
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
    num_tokens = sum(len(r.prompt_token_ids) + (r.sampling.max_tokens or 0) - 1 for r in some_requests("r"))
    assert sum(rows.values()) == 4 * num_tokens, "each token of each of 4 MoE layers goes to one host once"
    assert sum(engine.stats().host_bytes_out.values()) == 4 * num_tokens * 64 * 4


def test_two_attention_workers_share_hosts(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack
) -> None:
    hosts, topology = start_hosts(model_dir, tmp_path / "run", 2, resources, num_replicas=2)
    pairs = [start_attention(model_dir, tmp_path / "run", index, topology, resources) for index in range(2)]
    group, collector = EngineGroup([engine for _, engine in pairs]), Collector()
    group.start(collector.collect)
    resources.callback(group.close)
    assert collector.run(group, some_requests("r")) == expected
    for host in hosts:
        assert host.stats().rows_by_worker.keys() == {"attention-0", "attention-1"}


def test_a_worker_dials_unix_on_its_own_node_and_tcp_elsewhere(
    model_dir: Path, tmp_path: Path, resources: ExitStack
) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", 2, resources, locations=(HERE, ELSEWHERE))
    worker, _ = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    families = {}
    for host, link in worker._follower.dispatcher.links.items():
        descriptor = link.fileno()
        assert descriptor is not None
        with socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM) as copy:
            families[host] = copy.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    assert families == {"expert-0": socket.AF_UNIX, "expert-1": socket.AF_INET}


def test_a_new_topology_is_adopted_between_steps_and_keeps_the_links_it_can(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack
) -> None:
    _, first = start_hosts(model_dir, tmp_path / "a", 2, resources)
    worker, engine = start_attention(model_dir, tmp_path / "a", 0, first, resources)
    before = dict(worker._follower.dispatcher.links)
    collector = Collector()
    engine.start(collector.collect)
    for request in some_requests("r"):
        engine.submit(request)
    collector.wait_for_tokens("r0", 2)
    swapped = {pair: tuple(reversed(hosts)) for pair, hosts in first.placement.hosts_of.items()}
    same_hosts = Topology(epoch=2, placement=type(first.placement)(hosts_of=swapped), hosts=first.hosts)
    assert worker.publish(same_hosts).epoch == 2
    assert worker._follower.dispatcher.links == before
    assert worker.status().epoch == 2
    collector.wait_for([f"r{index}" for index in range(6)])
    assert {name: tuple(tokens) for name, tokens in collector.tokens.items()} == expected


def next_epoch(topology: Topology, *hosts: ExpertHost, num_replicas: int = 1) -> Topology:
    """Place on these hosts, which map what they lack."""
    slots = [HostSlot(host=host.status().worker, node=host.location().node) for host in hosts]
    placement = topology.placement
    if {slot.host for slot in slots} != topology.hosts.keys():
        geometry = ExpertGeometry(moe_layers=(0, 1, 2, 3), num_experts=16, expert_width=96, expert_bytes=1)
        placement = place(geometry, slots, num_replicas=num_replicas)
    addresses = {}
    for slot, host in zip(slots, hosts, strict=True):
        host.add(placement.held_by(slot.host))
        address = host.address()
        assert address is not None
        addresses[slot.host] = address
    return Topology(epoch=topology.epoch + 1, placement=placement, hosts=addresses)


def finish(collector: Collector, num: int = 6) -> Tokens:
    names = [f"r{index}" for index in range(num)]
    collector.wait_for(names)
    assert [collector.last[name].error for name in names] == [None] * num
    return {name: tuple(collector.tokens[name]) for name in names}


def test_the_only_holder_of_experts_dies_mid_stream_and_another_host_maps_them(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack
) -> None:
    (stays, goes), topology = start_hosts(model_dir, tmp_path / "run", 2, resources)
    _, engine = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    collector = Collector()
    engine.start(collector.collect)
    for request in some_requests("r"):
        engine.submit(request)
    collector.wait_for_tokens("r0", 2)
    assert "r0" not in collector.last
    goes.close()
    assert finish(collector) == expected
    held = set(stays.status().experts)
    assert held - set(topology.placement.held_by("expert-0")), "it took over"
    stays.restore(topology.placement.held_by("expert-0"))
    assert set(stays.status().experts) == held, "what is adopted stays as long as rows may come for it"
    stays.keep(topology.placement.held_by("expert-0"))
    assert set(stays.status().experts) == set(topology.placement.held_by("expert-0"))


def test_hosts_come_and_go_under_a_running_stream(model_dir: Path, tmp_path: Path, resources: ExitStack) -> None:
    hosts, topology = start_hosts(model_dir, tmp_path / "run", 2, resources)
    worker, engine = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    collector = Collector()
    engine.start(collector.collect)
    requests = some_requests("r", max_tokens=60)  # they must still run when the last host goes
    for request in requests:
        engine.submit(request)
    collector.wait_for_tokens("r0", 1)
    joiner = ExpertHost(config(model_dir, tmp_path / "run", Role.EXPERT, 2), ELSEWHERE)
    resources.callback(joiner.close)
    joiner.load(())
    for members, num_tokens in (([*hosts, joiner], 3), ([hosts[0], joiner], 5), ([hosts[0]], 7)):
        topology = next_epoch(topology, *members)
        worker.connect(topology.hosts)
        adopted = worker.publish(topology)
        assert (adopted.epoch, adopted.switch_s < 1.0) == (topology.epoch, True)
        for host in (*hosts, joiner):
            host.keep(topology.placement.held_by(host.status().worker))
        collector.wait_for_tokens("r0", num_tokens)
    joiner.close()
    hosts[1].close()
    assert finish(collector) == reference(model_dir, requests)
    assert engine.stats().host_rows.keys() == {"expert-0", "expert-1", "expert-2"}
    assert hosts[0].stats().adopted == 0


def test_a_topology_with_a_host_out_of_reach_is_used_and_the_host_too_when_it_comes(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack
) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", 2, resources, num_replicas=2)
    path = Path(topology.hosts["expert-1"].unix.removeprefix("unix:"))
    hidden = path.rename(tmp_path / "hidden.sock")
    worker = AttentionWorker(config(model_dir, tmp_path / "run", Role.ATTENTION, 0), HERE)
    resources.callback(worker.close)
    worker.load()
    with pytest.raises(LinkDownError):
        worker.connect(topology.hosts)
    assert worker.publish(topology).epoch == 1
    engine = RemoteEngine(worker.serve(), secret=SECRET)
    resources.callback(engine.close)
    collector = Collector()
    engine.start(collector.collect)
    assert collector.run(engine, some_requests("r")) == expected
    assert engine.stats().host_rows.keys() == {"expert-0"}
    hidden.rename(path)
    wait_until(lambda: worker._follower.dispatcher.links.keys() == {"expert-0", "expert-1"})
    assert collector.run(engine, some_requests("s")) == {f"s{name[1:]}": tokens for name, tokens in expected.items()}
    assert engine.stats().host_rows["expert-1"] > 0


def test_a_host_that_was_lost_and_is_back_in_the_same_life_is_used_again(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack
) -> None:
    (_, host), topology = start_hosts(model_dir, tmp_path / "run", 2, resources, num_replicas=2)
    worker, engine = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    collector = Collector()
    engine.start(collector.collect)
    for request in some_requests("r"):
        engine.submit(request)
    collector.wait_for_tokens("r0", 1)
    first = worker._follower.dispatcher.links["expert-1"]
    with socket.fromfd(first.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as copy:  # type: ignore[arg-type]
        copy.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: worker._follower.dispatcher.links.get("expert-1", first) is not first)
    before = host.stats().rows_by_worker["attention-0"]
    assert finish(collector) == expected
    assert collector.run(engine, some_requests("s")) == {f"s{name[1:]}": tokens for name, tokens in expected.items()}
    assert host.stats().rows_by_worker["attention-0"] > before


@pytest.mark.parametrize("serving", [True, False])
def test_an_epoch_that_is_not_newer_is_refused_and_changes_nothing(
    model_dir: Path, tmp_path: Path, resources: ExitStack, serving: bool
) -> None:
    (host,), topology = start_hosts(model_dir, tmp_path / "run", 1, resources)
    worker = AttentionWorker(config(model_dir, tmp_path / "run", Role.ATTENTION, 0), HERE)
    resources.callback(worker.close)
    worker.load()
    assert worker.topology() is None
    later = next_epoch(next_epoch(topology, host), host)
    worker.publish(later)
    if serving:
        RemoteEngine(worker.serve(), secret=SECRET).close()
    for stale in (topology, later):
        with pytest.raises(PreconditionError, match=f"epoch {stale.epoch} is not newer than 3") as caught:
            worker.publish(stale)
        assert caught.value.reason == "STALE_EPOCH"
    assert (worker.topology(), worker.status().epoch) == (later, 3)


def test_of_epochs_published_at_once_the_newest_stays(model_dir: Path, tmp_path: Path, resources: ExitStack) -> None:
    hosts, topology = start_hosts(model_dir, tmp_path / "run", 2, resources)
    worker, engine = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    engine.start(lambda outputs: None)
    epochs = [topology]
    for _ in range(8):
        epochs.append(next_epoch(epochs[-1], *hosts))
    adopted: list[int] = []

    def publish(one: Topology) -> None:
        with suppress(PreconditionError):
            adopted.append(worker.publish(one).epoch)

    threads = [threading.Thread(target=publish, args=(one,)) for one in reversed(epochs[1:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert adopted == sorted(adopted)
    assert worker.status().epoch == worker._follower.dispatcher.published.epoch == epochs[-1].epoch
    assert worker._follower.dispatcher.links.keys() == {"expert-0", "expert-1"}


def test_a_restored_link_is_not_thrown_away_by_a_topology_that_was_on_its_way(
    model_dir: Path, tmp_path: Path, resources: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, topology = start_hosts(model_dir, tmp_path / "run", 2, resources)
    worker, engine = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    engine.start(lambda outputs: None)
    take = worker._follower.links.take

    def take_before_it_is_restored(addresses: Any, in_use: Any) -> Any:
        taken = take(addresses, {host: link for host, link in in_use.items() if host == "expert-0"})
        assert taken.keys() == {"expert-0"}, "the host refuses a second link"
        return taken

    monkeypatch.setattr(worker._follower.links, "take", take_before_it_is_restored)
    worker.publish(next_epoch(topology, *hosts))
    assert worker._follower.dispatcher.links.keys() == {"expert-0", "expert-1"}


def test_a_link_that_fell_while_a_topology_was_on_its_way_is_dialled_again(
    model_dir: Path, tmp_path: Path, resources: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, topology = start_hosts(model_dir, tmp_path / "run", 2, resources)
    worker, engine = start_attention(model_dir, tmp_path / "run", 0, topology, resources)
    engine.start(lambda outputs: None)
    take = worker._follower.links.take

    def take_and_fall(addresses: Any, in_use: Any) -> Any:
        taken = take(addresses, in_use)
        worker._engine.between_steps(
            lambda: worker._follower.dispatcher._exchange.posting.lose(("expert-1",), "LINK_DOWN")
        )
        return taken

    monkeypatch.setattr(worker._follower.links, "take", take_and_fall)
    worker.publish(next_epoch(topology, *hosts))
    wait_until(lambda: worker._follower.dispatcher.links.keys() == {"expert-0", "expert-1"})


def test_hosts_of_one_checkpoint_agree_on_their_experts_and_load_is_counted(
    model_dir: Path, tmp_path: Path, resources: ExitStack
) -> None:
    (first, second), topology = start_hosts(model_dir, tmp_path / "run", 2, resources, num_replicas=2)
    pairs = topology.placement.held_by("expert-0")
    assert first.fingerprints(pairs) == second.fingerprints(pairs)
    assert first.fingerprints([(0, 0), (9, 9)]).keys() == {(0, 0)}
    assert first.keep(pairs[1:]) == first.keep(pairs) + 3 * 64 * 96 * 4
    assert first.fingerprints([(0, 0)]) == {}
    load = second.load_now()
    assert (load.host, load.incarnation, load.bytes_held) == (
        "expert-1",
        second.status().incarnation,
        64 * 3 * 64 * 96 * 4,
    )


def test_a_host_that_has_not_loaded_says_so(model_dir: Path, tmp_path: Path) -> None:
    host = ExpertHost(config(model_dir, tmp_path / "run", Role.EXPERT, 0), HERE)
    assert (host.address(), host.load_now().bytes_held, host.status().experts) == (None, 0, ())
    for ask in (host.add, host.keep, host.restore):
        with pytest.raises(UnavailableError, match="expert-0 has not loaded"):
            ask([(0, 0)])
    host.close()


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
        worker._follower.links._dial(address)
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
        stranger.connect(topology.hosts)


def test_a_worker_of_another_checkpoint_is_refused(model_dir: Path, tmp_path: Path, resources: ExitStack) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", 1, resources)
    other = make_checkpoint(tmp_path / "other", "scout", rope_theta=10000.0)
    stranger = AttentionWorker(config(other, tmp_path / "run", Role.ATTENTION, 0), HERE)
    resources.callback(stranger.close)
    stranger.load()
    with pytest.raises(HandshakeError, match="MODEL_HASH_DIFFERS"):
        stranger.connect(topology.hosts)


@needs_compiler
@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_a_worker_of_another_weight_format_is_refused(
    model_dir: Path, tmp_path: Path, resources: ExitStack, weights: str
) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", 1, resources, weights=weights)
    other = "int8" if weights == "stored" else "stored"
    stranger = AttentionWorker(config(model_dir, tmp_path / "run", Role.ATTENTION, 0, weights=other), HERE)
    resources.callback(stranger.close)
    stranger.load()
    with pytest.raises(HandshakeError, match="ARITHMETIC_DIFFERS"):
        stranger.connect(topology.hosts)


@needs_compiler
def test_int8_workers_give_the_tokens_of_one_int8_process_and_agree_with_each_other(
    model_dir: Path, expected: Tokens, tmp_path: Path, resources: ExitStack
) -> None:
    hosts, topology = start_hosts(model_dir, tmp_path / "run", 2, resources, num_replicas=2, weights="int8")
    _, engine = start_attention(
        model_dir, tmp_path / "run", 0, topology, resources, weights="int8", cross_check_every=1
    )
    collector = Collector()
    engine.start(collector.collect)
    found = collector.run(engine, some_requests("r"))
    assert found == reference(model_dir, some_requests("r"), "int8") != expected
    prints = [host.fingerprints(sorted(host.status().experts)) for host in hosts]
    assert prints[0] == prints[1]
    referee = Referee(Checkpoint.open(model_dir), dtype=torch.float32, device="cpu", weights="int8")
    x_RD = torch.randn(3, 64)
    out_RD = torch.empty_like(x_RD)
    hosts[0]._held()(1, ((3, 3),), x_RD, out_RD)
    assert torch.equal(referee(1, 3, x_RD), out_RD), "it could judge neither of them"


def test_a_dense_model_has_nothing_to_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no routed experts"):
        read_geometry(make_checkpoint(tmp_path, "dense"), "auto")


def test_what_a_replaced_controller_says_late_is_not_heard(
    model_dir: Path, tmp_path: Path, resources: ExitStack
) -> None:
    _, topology = start_hosts(model_dir, tmp_path / "run", 1, resources)
    worker, _ = start_attention(model_dir, tmp_path / "run", 0, replace(topology, publisher=7), resources)
    assert worker.topology(8) == topology, "its successor has asked"
    with pytest.raises(PreconditionError) as caught:
        worker.publish(replace(topology, epoch=2, publisher=7))
    assert caught.value.reason == "STALE_CONTROLLER"
    assert worker.publish(replace(topology, epoch=2, publisher=8)).epoch == 2
