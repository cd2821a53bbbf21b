"""Leaders and members as plain objects in this process, over real Unix and TCP sockets and gloo."""

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.control_plane.forming import FormingError
from cluster.data_plane.group_leader import GroupLeader
from cluster.data_plane.stage_worker import StageWorker
from cluster.plan import stages_of
from cluster.worker import Role, WorkerConfig
from llama4_dist.dispatch.challenge import Dialler
from llama4_dist.dispatch.links.address import parse_address
from llama4_dist.dispatch.links.connect import shake_hands
from llama4_dist.engine.build import build_single_process
from llama4_dist.errors import HandshakeError, PreconditionError, UnavailableError
from llama4_dist.partition import Partition
from llama4_dist.stages.links.frame import VERSION
from llama4_dist.stages.links.hello import MAGIC, Hello, read_hello
from tests.checkpoints import make_checkpoint
from tests.cluster.local_group import HERE, OPTIONS, SECRET, WIDE, Cluster, serve
from tests.cluster.running import Collector, Tokens, some_requests
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make(model_dir: Path, resources: ExitStack) -> Callable[[Partition], Cluster]:
    folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="l4-"))  # pytest's are long for a socket
    return lambda partition: Cluster(model_dir, Path(folder) / "run", partition, resources)


def expected(model_dir: Path, partition: Partition, **options: Any) -> Tokens:
    engine, collector = (
        build_single_process(model_dir, partition=partition, num_threads=1, options=OPTIONS),
        Collector(),
    )
    engine.start(collector.collect)
    try:
        return collector.run(engine, some_requests("r", **options))
    finally:
        engine.close()


@pytest.mark.parametrize("cut", [(3, 1), (1, 2), (2, 2)], ids=str)
def test_a_group_over_sockets_gives_the_tokens_of_threads(
    make: Callable[[Partition], Cluster], model_dir: Path, cut: tuple[int, int]
) -> None:
    partition = Partition(num_stages=cut[0], num_ranks=cut[1])
    cluster = make(partition)
    cluster.form(1)
    assert cluster.formations() == {1}
    engine, collector = serve(cluster), Collector()
    engine.start(collector.collect)
    assert collector.run(engine, some_requests("r")) == expected(model_dir, partition)
    links = cluster.plain("attention-0")._group.links
    families = {link.peer: link._connection.family for link in links if link.peer.startswith("stage-")}
    assert families["stage-0-rank-0"] == socket.AF_UNIX
    if partition.num_stages > 1:
        assert families["stage-1-rank-0"] == socket.AF_INET, "it is on another node"


@pytest.mark.parametrize("victim", ["attention-0-stage-0-rank-0", "attention-0-stage-1-rank-1"])
def test_requests_go_on_with_the_group_that_is_formed_after_a_member_died(
    make: Callable[[Partition], Cluster], model_dir: Path, victim: str
) -> None:
    cluster = make(WIDE)
    cluster.form(1)
    engine, collector = serve(cluster), Collector()
    engine.start(collector.collect)
    for request in some_requests("r", max_tokens=40):
        engine.submit(request)
    collector.wait_for_tokens("r0", 3)
    (dead,) = cluster.members.named([victim])
    survivor = cluster.plain("attention-0-stage-0-rank-1")
    dead.plain.close()  # type: ignore[attr-defined]
    wait_until(lambda: cluster.plain("attention-0").status().formation == 0)
    weights = survivor._model
    cluster.start(cluster.stages[victim])
    cluster.form(2)
    collector.wait_for([f"r{index}" for index in range(6)])
    assert {name: tuple(tokens) for name, tokens in collector.tokens.items()} == expected(
        model_dir, WIDE, max_tokens=40
    )
    assert cluster.formations() == {2}
    assert survivor._model is weights, "weights were read again"
    assert engine.stats().requests_replayed > 0


def test_requests_wait_while_there_is_no_group(make: Callable[[Partition], Cluster], model_dir: Path) -> None:
    cluster = make(Partition(num_stages=2))
    cluster.form(1)
    engine, collector = serve(cluster), Collector()
    engine.start(collector.collect)
    for handle in cluster.members.all:
        handle.plain.prepare(2)  # type: ignore[attr-defined]
    for request in some_requests("r"):
        engine.submit(request)
    assert collector.tokens == {}
    cluster.form(3)
    collector.wait_for([f"r{index}" for index in range(6)])
    tokens = {name: tuple(tokens) for name, tokens in collector.tokens.items()}
    assert tokens == expected(model_dir, Partition(num_stages=2))


def test_a_new_leader_goes_on_with_the_members_there_are(make: Callable[[Partition], Cluster], model_dir: Path) -> None:
    cluster = make(WIDE)
    cluster.form(1)
    cluster.plain("attention-0").close()
    cluster.start(cluster.leader)
    assert cluster.formations() == {0}
    cluster.form(5)
    engine, collector = serve(cluster), Collector()
    engine.start(collector.collect)
    assert collector.run(engine, some_requests("r")) == expected(model_dir, WIDE)


def test_a_topology_is_switched_between_two_parts(make: Callable[[Partition], Cluster], model_dir: Path) -> None:
    """Members follow it one after the other: what is computed does not depend on who follows which."""
    cluster = make(Partition(num_stages=2))
    cluster.form(1)
    engine, collector = serve(cluster), Collector()
    engine.start(collector.collect)
    for request in some_requests("r", max_tokens=40):
        engine.submit(request)
    for epoch in range(2, 8):
        collector.wait_for_tokens("r0", epoch)
        for handle in cluster.members.all:
            assert handle.plain.publish(replace(cluster.topology, epoch=epoch)).epoch == epoch  # type: ignore[attr-defined]
    collector.wait_for([f"r{index}" for index in range(6)])
    tokens = {name: tuple(tokens) for name, tokens in collector.tokens.items()}
    assert tokens == expected(model_dir, Partition(num_stages=2), max_tokens=40)


def test_a_formation_that_is_not_newer_or_was_not_prepared_is_refused(make: Callable[[Partition], Cluster]) -> None:
    cluster = make(Partition(num_stages=2))
    cluster.form(4)
    for name in cluster.group.all:
        with pytest.raises(PreconditionError, match="formation 4 is not newer than 4"):
            cluster.plain(name).prepare(4)
    assert cluster.formations() == {4}, "a stale word ended the group"


def test_a_member_of_another_model_is_refused_and_told_why(
    make: Callable[[Partition], Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The others wait so long for who was refused.
    monkeypatch.setattr("cluster.data_plane.stage_worker.FORM_TIMEOUT_S", 3.0)
    monkeypatch.setattr("cluster.data_plane.group_leader.FORM_TIMEOUT_S", 3.0)
    cluster = make(Partition(num_stages=2))
    other = make_checkpoint(tmp_path / "other", "scout", num_shards=3)
    cluster.start(replace(cluster.stages["attention-0-stage-1-rank-0"], model_dir=other), follows=False)
    with pytest.raises(HandshakeError) as caught:
        cluster.form(1)
    assert caught.value.reason == "MODEL_HASH_DIFFERS"


def test_who_does_not_know_the_secret_learns_nothing(make: Callable[[Partition], Cluster]) -> None:
    cluster = make(Partition(num_stages=2))
    cluster.form(1)
    door = cluster.plain("attention-0-stage-0-rank-0")._door
    for secret, reason in ((b"x" * 32, "HANDSHAKE_CLOSED"), (SECRET, "NOT_FORMING")):
        hello = Hello(
            purpose="plans", stage=2, rank=0, messages=VERSION, group="attention-0", formation=1, model_hash="",
            num_stages=2, num_ranks=1, num_pages=1, block_size=1, dtype="", weights="", arithmetic="",
        )  # fmt: skip
        family, where = parse_address(door.addresses[0])
        deadline = time.monotonic() + 10.0
        with socket.socket(family) as connection:
            connection.connect(where)
            with pytest.raises(HandshakeError) as caught:
                shake_hands(connection, Dialler(secret, hello.pack(), read_hello, magic=MAGIC), deadline)
        assert caught.value.reason == reason
    assert door.door.closed["SECRET_WRONG"] == 1
    assert cluster.formations() == {1}


def test_a_group_without_one_of_its_members_is_not_formed(
    make: Callable[[Partition], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.data_plane.stage_worker.FORM_TIMEOUT_S", 1.0)
    monkeypatch.setattr("cluster.data_plane.group_leader.FORM_TIMEOUT_S", 1.0)
    cluster = make(WIDE)
    absent = cluster.plain("attention-0-stage-1-rank-0")
    monkeypatch.setattr(absent, "form", lambda formation: None)
    with pytest.raises(FormingError, match="in time"):
        cluster.form(1)
    monkeypatch.undo()
    cluster.form(2)
    assert cluster.formations() == {2}, "who waited in vain is of no use any more"


def test_a_member_whose_part_does_not_end_is_named(
    make: Callable[[Partition], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama4_dist.stages.links.member.LEAVE_TIMEOUT_S", 0.3)
    cluster = make(Partition(num_stages=2))
    cluster.form(1)
    goes_on = threading.Event()
    cluster.resources.callback(goes_on.set)
    stuck = cluster.plain("attention-0-stage-1-rank-0")
    stuck._member.loop.post(goes_on.wait)
    with pytest.raises(FormingError) as caught:
        cluster.form(2)
    assert caught.value.hopeless == {"attention-0-stage-1-rank-0"}


def test_who_has_not_loaded_says_so(model_dir: Path, tmp_path: Path) -> None:
    config = WorkerConfig(
        worker="attention-0", role=Role.ATTENTION, model_dir=model_dir, dtype="auto", device="cpu", num_threads=1,
        run_dir=tmp_path, secret=SECRET, options=OPTIONS, partition=WIDE,
    )  # fmt: skip
    for worker in (GroupLeader(config, HERE), StageWorker(stages_of(config, num_threads=1)[0], HERE)):
        with pytest.raises(UnavailableError, match="has not loaded"):
            worker.prepare(1)
