"""One worker's links over real sockets: dialled again when they go down, to the same life of a host, and to no liar."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.data_plane.host_links import HostLinks
from cluster.data_plane.topology_follower import usable
from cluster.worker import HostAddress
from llama4_dist.dispatch.handshake import Hello
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import Link
from llama4_dist.errors import HandshakeError, LinkDownError, UnavailableError
from tests.dispatch.fakes import ScalingExperts
from tests.dispatch.servers import LIMITS, SECRET, ServerThread, hello
from tests.waiting import PATIENCE_S, wait_until


class Worker:
    """What an attention worker does with its links, without an engine."""

    def __init__(self) -> None:
        self.hello: Hello = hello()
        self.in_use: dict[str, Link] = {}
        self.dialled: list[str] = []
        self.made: list[Link] = []  # a link that nobody refers to would close itself
        self.refusals = 0
        self.before_dial: Callable[[], object] = lambda: None
        self.links = HostLinks(self.dial, self.restore)

    def dial(self, address: HostAddress) -> Link:
        self.dialled.append(address.host)
        self.before_dial()
        self.made.append(connect(address.unix, hello=self.hello, secret=SECRET, limits=LIMITS, timeout_s=5.0))
        return self.made[-1]

    def restore(self, link: Link) -> None:
        if self.refusals:
            self.refusals -= 1
            raise UnavailableError("the engine is closing")
        self.in_use[link.peer] = link

    def publish(self, *addresses: HostAddress) -> dict[str, Link]:
        hosts = {address.host: address for address in addresses}
        self.in_use = self.links.take(hosts, self.in_use)
        for host, address in hosts.items():
            if host not in self.in_use:
                self.links.lost(host, address.incarnation, "NOT_REACHED")
        return self.in_use

    def abort(self) -> None:
        for link in self.in_use.values():
            link.abort()

    def lose(self, host: str, reason: str = "LINK_DOWN") -> None:
        link = self.in_use.pop(host)
        link.abort()
        self.links.lost(host, link.peer_incarnation, reason)


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def worker(resources: ExitStack) -> Worker:
    worker = Worker()
    resources.callback(worker.links.close)
    resources.callback(worker.abort)
    return worker


def serve(resources: ExitStack, path: Path, host: str = "host-0") -> tuple[ServerThread, HostAddress]:
    server = ServerThread(host, ScalingExperts(()), [f"unix:{path / host}"])
    resources.callback(server.stop)
    address = HostAddress(
        host=host, incarnation=server.server.identity.incarnation, node="n", unix=server.addresses[0], tcp=""
    )
    return server, address


def test_a_link_that_was_reset_is_dialled_again(resources: ExitStack, tmp_path: Path, worker: Worker) -> None:
    server, address = serve(resources, tmp_path)
    first = worker.publish(address)["host-0"]
    for num_lives in (2, 3):
        worker.lose("host-0")
        wait_until(lambda: "host-0" in worker.in_use)

        def was_dialled(num_lives: int = num_lives) -> bool:
            return len(worker.dialled) >= num_lives

        wait_until(was_dialled)
    assert worker.in_use["host-0"] is not first
    assert worker.in_use["host-0"].peer_incarnation == address.incarnation
    assert server.is_alive


def test_a_host_that_is_away_is_dialled_until_it_is_there(resources: ExitStack, tmp_path: Path, worker: Worker) -> None:
    _, there = serve(resources, tmp_path)
    away = HostAddress(host="host-1", incarnation=there.incarnation, node="n", unix=f"unix:{tmp_path}/host-1", tcp="")
    assert worker.publish(there, away).keys() == {"host-0"}
    wait_until(lambda: worker.dialled.count("host-1") >= 3)
    assert worker.in_use.keys() == {"host-0"}
    serve(resources, tmp_path, "host-1")
    wait_until(lambda: "host-1" in worker.in_use)
    assert worker.dialled.count("host-0") == 1


def test_a_link_that_cannot_be_put_to_use_yet_is_tried_again(
    resources: ExitStack, tmp_path: Path, worker: Worker
) -> None:
    _, address = serve(resources, tmp_path)
    worker.publish(address)
    worker.refusals = 2
    worker.lose("host-0")
    wait_until(lambda: "host-0" in worker.in_use)
    assert worker.dialled.count("host-0") >= 4


def test_a_later_life_of_a_host_is_not_used_under_the_topology_of_the_former(
    resources: ExitStack, tmp_path: Path, worker: Worker
) -> None:
    _, later = serve(resources, tmp_path)
    former = replace(later, incarnation=later.incarnation - 1)
    with pytest.raises(LinkDownError, match="answers as incarnation") as caught:
        worker.links.connect({"host-0": former}, {})
    assert caught.value.reason == "OTHER_INCARNATION"
    assert worker.publish(former) == {}
    wait_until(lambda: worker.dialled.count("host-0") >= 4)
    assert worker.in_use == {}
    assert worker.publish(later).keys() == {"host-0"}


def test_a_host_that_left_the_topology_is_not_dialled_again(
    resources: ExitStack, tmp_path: Path, worker: Worker
) -> None:
    _, stays = serve(resources, tmp_path)
    gone = HostAddress(host="host-1", incarnation=1, node="n", unix=f"unix:{tmp_path}/host-1", tcp="")
    worker.publish(stays, gone)
    wait_until(lambda: worker.dialled.count("host-1") >= 2)
    worker.publish(stays)
    worker.lose("host-0")
    wait_until(lambda: "host-0" in worker.in_use)
    num = worker.dialled.count("host-1")
    worker.lose("host-0")
    wait_until(lambda: "host-0" in worker.in_use)
    assert worker.dialled.count("host-1") == num


def test_a_host_that_computed_wrong_answers_is_never_dialled_again(
    resources: ExitStack, tmp_path: Path, worker: Worker
) -> None:
    _, liar = serve(resources, tmp_path)
    _, honest = serve(resources, tmp_path, "host-1")
    worker.publish(liar, honest)
    worker.lose("host-0", "ANSWER_WRONG")
    worker.links.lost("host-0", liar.incarnation, "LINK_DOWN")
    worker.lose("host-1")
    wait_until(lambda: "host-1" in worker.in_use)
    worker.links.connect({"host-0": liar, "host-1": honest}, worker.in_use)
    assert worker.publish(liar, honest).keys() == {"host-1"}, "nor under the next topology"
    worker.lose("host-1")
    wait_until(lambda: "host-1" in worker.in_use)
    assert worker.dialled.count("host-0") == 1


def test_a_connection_made_before_a_topology_is_used_by_it_and_a_useless_one_is_closed(
    resources: ExitStack, tmp_path: Path, worker: Worker
) -> None:
    _, first = serve(resources, tmp_path)
    server, second = serve(resources, tmp_path, "host-1")
    worker.links.connect({"host-0": first, "host-1": second}, {})
    worker.links.connect({"host-0": first, "host-1": second}, {})
    assert worker.dialled == ["host-0", "host-1"]
    wait_until(lambda: len(server.server._workers.by_id) == 1)
    assert worker.publish(first).keys() == {"host-0"}
    assert worker.dialled == ["host-0", "host-1"]
    wait_until(lambda: not server.server._workers.by_id)


def test_a_host_that_refuses_is_named(resources: ExitStack, tmp_path: Path, worker: Worker) -> None:
    _, address = serve(resources, tmp_path)
    worker.hello = replace(worker.hello, model_hash="f" * 64)
    with pytest.raises(HandshakeError, match="MODEL_HASH_DIFFERS"):
        worker.links.connect({"host-0": address}, {})
    assert worker.publish(address) == {}


def test_a_host_dialled_meanwhile_is_no_failure(resources: ExitStack, tmp_path: Path, worker: Worker) -> None:
    server, address = serve(resources, tmp_path)
    other = server.connect()  # as if the thread had dialled it between the look and the dial
    resources.callback(other.abort)
    worker.links.connect({"host-0": address}, {})
    assert worker.dialled == ["host-0"]


def test_what_is_lost_again_at_once_is_dialled_again(resources: ExitStack, tmp_path: Path, worker: Worker) -> None:
    _, address = serve(resources, tmp_path)
    worker.publish(address)
    restore, flaps = worker.restore, [3]

    def flap(link: Link) -> None:
        restore(link)
        if flaps[0]:
            flaps[0] -= 1
            worker.lose("host-0")

    worker.links._restore = flap
    worker.lose("host-0")
    wait_until(lambda: not flaps[0] and "host-0" in worker.in_use)


def test_closing_ends_a_dial_that_is_under_way_and_whatever_comes_after(
    resources: ExitStack, tmp_path: Path, worker: Worker
) -> None:
    server, address = serve(resources, tmp_path)
    worker.publish(address)
    dialling, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        dialling.set()
        go_on.wait(PATIENCE_S)

    worker.before_dial = hold
    worker.lose("host-0")
    assert dialling.wait(PATIENCE_S)
    closing = threading.Thread(target=worker.links.close)
    closing.start()
    wait_until(lambda: worker.links._closing)
    go_on.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    for link in worker.in_use.values():
        link.abort()
    wait_until(lambda: not server.server._workers.by_id)
    worker.links.lost("host-0", address.incarnation, "LINK_DOWN")
    worker.links.connect({"host-0": address}, {})
    wait_until(lambda: not server.server._workers.by_id)
    assert len(worker.made) == 3
    with pytest.raises(LinkDownError, match="closed here"):
        worker.made[-1].poll(0.0)
    worker.links.close()


def test_nothing_is_left_of_links_that_came_and_went(resources: ExitStack, tmp_path: Path) -> None:
    server, address = serve(resources, tmp_path)

    def round_trip() -> None:
        worker = Worker()
        worker.publish(address)
        worker.lose("host-0")
        wait_until(lambda: "host-0" in worker.in_use)
        worker.links.close()
        worker.in_use["host-0"].abort()
        wait_until(lambda: not server.server._workers.by_id)

    round_trip()
    process = psutil.Process()
    before = (process.num_fds(), threading.active_count())
    for _ in range(5):
        round_trip()
    wait_until(lambda: (process.num_fds(), threading.active_count()) <= before)


class Peer:
    """A link by name."""

    def __init__(self, peer_incarnation: int) -> None:
        self.peer_incarnation = peer_incarnation


def test_a_new_table_uses_what_is_up_when_it_is_switched_to() -> None:
    kept, fallen, fresh, restored, other_life = (Peer(number) for number in (1, 2, 3, 4, 9))
    taken = {"kept": kept, "fallen": fallen, "fresh": fresh}
    then = {"kept": kept, "fallen": fallen}
    now = {"kept": kept, "restored": restored, "former": other_life}
    incarnations = {"kept": 1, "fallen": 2, "fresh": 3, "restored": 4, "former": 8}
    links: Mapping[str, object] = usable(taken, then, now, incarnations)  # type: ignore[arg-type]
    assert links == {"kept": kept, "fresh": fresh, "restored": restored}
