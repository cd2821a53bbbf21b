"""The handshake without sockets: byte by byte, and a host that only pretends."""

from dataclasses import replace

import pytest

from llama4_dist.dispatch.handshake import HostHandshake, WorkerHandshake
from llama4_dist.dispatch.links.link import LinkLimits
from llama4_dist.errors import HandshakeError
from tests.dispatch.servers import SECRET, hello

HOST = replace(hello("host-0"), role="expert")


def shake(worker: WorkerHandshake, host: HostHandshake, *, step: int = 10_000) -> bytes:
    """Run both sides, at most `step` bytes at a time, and return the host's answer."""

    def feed(data: bytes) -> bytes:
        return b"".join(host.feed(data[start : start + step]) for start in range(0, len(data), step))

    return feed(worker.prove(feed(worker.greeting())))


def finish(worker: WorkerHandshake, answer: bytes):
    prefix = answer[: worker.ANSWER_PREFIX_BYTES]
    assert worker.answer_len(prefix) == len(answer) - len(prefix)
    return worker.finish(prefix, answer[len(prefix) :])


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_both_sides_agree_on_the_smaller_limits_however_the_bytes_arrive(step: int) -> None:
    worker = WorkerHandshake(hello("worker-0", incarnation=3), LinkLimits(max_rows=100, credit=8), SECRET)
    host = HostHandshake(HOST, LinkLimits(max_rows=200, credit=2), SECRET)
    agreement = finish(worker, shake(worker, host, step=step))
    assert (agreement.peer.id, agreement.limits.max_rows, agreement.limits.credit) == ("host-0", 100, 2)
    assert host.agreement is not None
    assert (host.agreement.peer.id, host.agreement.peer.incarnation) == ("worker-0", 3)
    assert host.agreement.rules == agreement.rules


def test_an_answer_of_another_session_proves_nothing() -> None:
    limits = LinkLimits()
    recorded = shake(WorkerHandshake(hello(), limits, SECRET), HostHandshake(HOST, limits, SECRET))
    worker = WorkerHandshake(hello(), limits, SECRET)
    shake(worker, HostHandshake(HOST, limits, SECRET))
    with pytest.raises(HandshakeError) as caught:
        finish(worker, recorded)
    assert caught.value.reason == "SECRET_WRONG"


def test_an_altered_answer_is_not_believed() -> None:
    worker = WorkerHandshake(hello(), LinkLimits(), SECRET)
    answer = bytearray(shake(worker, HostHandshake(HOST, LinkLimits(), SECRET)))
    answer[-1] ^= 1
    with pytest.raises(HandshakeError) as caught:
        finish(worker, bytes(answer))
    assert caught.value.reason == "SECRET_WRONG"


def test_bytes_before_the_answer_are_refused() -> None:
    worker, host = WorkerHandshake(hello(), LinkLimits(), SECRET), HostHandshake(HOST, LinkLimits(), SECRET)
    proof = worker.prove(host.feed(worker.greeting()))
    with pytest.raises(HandshakeError) as caught:
        host.feed(proof + b"x")
    assert caught.value.reason == "BYTES_BEFORE_ANSWER"
