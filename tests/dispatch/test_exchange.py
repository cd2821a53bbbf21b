"""What a dispatcher believes of a host's answers: a host scripted by hand at the other end of a link."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.links.inproc import InprocLink, inproc_pair
from llama4_dist.dispatch.links.link import Frame, FrameHeader, FrameKind, LinkLimits
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.errors import UnavailableError
from tests.dispatch.fakes import WIDTH, ManualClock, whole

Script = Callable[[InprocLink, FrameHeader, Tensor], None]


def honest(link: InprocLink, header: FrameHeader, rows_RD: Tensor) -> None:
    """Answer with the rows doubled."""
    link.post(header._replace(kind=FrameKind.REPLY, groups=()), rows_RD * 2)


def answer_all(end: InprocLink, script: Script) -> None:
    for frame in end.poll(0.0):
        answer(end, script, frame)


def worker_with(**scripts: Script) -> Dispatcher:
    """A dispatcher whose hosts answer by script; expert 0 is on all of them, the first is preferred."""
    links = {}
    for host, script in scripts.items():
        links[host], end = inproc_pair(worker="worker", host=host, limits=LinkLimits(), clock=ManualClock())
        links[host].drive = partial(answer_all, end, script)
    table = RoutingTable(epoch=0, replicas={(0, 0): whole(*scripts), (0, 1): whole(*scripts)})
    return Dispatcher(
        worker="worker", incarnation=0, table=table, links=links, width=WIDTH, dtype=torch.float32, clock=ManualClock()
    )


def answer(end: InprocLink, script: Script, frame: Frame) -> None:
    assert frame.rows_RD is not None
    script(end, frame.header, frame.rows_RD)
    frame.release()


def ask(worker: Dispatcher, num_tokens: int = 3) -> None:
    x_TD = torch.arange(num_tokens * WIDTH, dtype=torch.float32).view(num_tokens, WIDTH)
    experts_T1 = torch.zeros(num_tokens, 1, dtype=torch.int64)
    y_TD = worker.combine(worker.dispatch(0, x_TD, experts_T1, torch.full((num_tokens, 1), 0.5)))
    assert torch.equal(y_TD, x_TD)


def wrong(**changes: object) -> Script:
    """Answer with a header that differs from the one asked."""

    def script(link: InprocLink, header: FrameHeader, rows_RD: Tensor) -> None:
        header = header._replace(kind=FrameKind.REPLY, groups=())._replace(**changes)  # type: ignore[arg-type]
        link.post(header, torch.full((header.num_rows, WIDTH), 9.0))

    return script


LIES = {
    "T22 other step": ({"step": 7}, "REPLY_MISMATCH"),
    "other microbatch": ({"microbatch": 1}, "REPLY_MISMATCH"),
    "other layer": ({"layer": 1}, "REPLY_MISMATCH"),
    "T25 fewer rows": ({"num_rows": 2}, "REPLY_MISMATCH"),
    "T25 more rows": ({"num_rows": 4}, "REPLY_MISMATCH"),
    "T24 a frame never sent": ({"number": 99}, "UNKNOWN_FRAME"),
    "T11 rows to a worker": ({"kind": FrameKind.ROWS}, "KIND_UNEXPECTED"),
    "a refusal of what was not asked": ({"kind": FrameKind.NACK, "groups": ((5, 1),), "reason": "X"}, "REPLY_MISMATCH"),
}


@pytest.mark.parametrize(("changes", "reason"), LIES.values(), ids=LIES)
def test_a_lying_host_loses_its_link_and_a_replica_answers(changes: dict[str, object], reason: str) -> None:
    worker = worker_with(liar=wrong(**changes), replica=honest)
    ask(worker)
    assert worker.stats().lost_hosts == {reason: 1}
    assert worker.table.hosts == {"replica"}


def test_a_lying_host_without_replica_is_an_error() -> None:
    with pytest.raises(UnavailableError):
        ask(worker_with(liar=wrong(num_rows=1)))


def test_a_host_may_not_answer_for_another() -> None:
    def silent(link: InprocLink, header: FrameHeader, rows_RD: Tensor) -> None:
        return

    thief = wrong(number=1)  # the first frame is the one to "asked"
    links: dict[str, InprocLink] = {}
    for host, script in {"asked": silent, "thief": thief, "third": honest}.items():
        links[host], end = inproc_pair(worker="worker", host=host, limits=LinkLimits(), clock=ManualClock())
        links[host].drive = partial(answer_all, end, script)
    table = RoutingTable(epoch=0, replicas={(0, 0): whole("asked", "third"), (0, 1): whole("thief", "third")})
    worker = Dispatcher(
        worker="worker", incarnation=0, table=table, links=links, width=WIDTH, dtype=torch.float32, clock=ManualClock()
    )
    x_TD = torch.ones(2, WIDTH)
    y_TD = worker.combine(worker.dispatch(0, x_TD, torch.tensor([[0], [1]]), torch.ones(2, 1)))
    assert torch.equal(y_TD, x_TD * 2)
    assert worker.stats().lost_hosts["REPLY_MISMATCH"] == 1


def test_a_second_reply_is_dropped_and_counted() -> None:  # T23
    def twice(link: InprocLink, header: FrameHeader, rows_RD: Tensor) -> None:
        honest(link, header, rows_RD)
        wrong()(link, header, rows_RD)

    worker = worker_with(host=twice)
    for _ in range(3):
        ask(worker)
    assert worker.stats().late_replies >= 2
    assert not worker.stats().lost_hosts


def test_a_reply_of_an_earlier_step_is_dropped() -> None:  # T22
    kept: list[FrameHeader] = []

    def late(link: InprocLink, header: FrameHeader, rows_RD: Tensor) -> None:
        for old in kept:
            wrong()(link, old, rows_RD)
        kept[:] = [header]
        honest(link, header, rows_RD)

    worker = worker_with(host=late)
    for step in range(3):
        worker.begin_step(step)
        ask(worker)
    assert worker.stats().late_replies == 2
