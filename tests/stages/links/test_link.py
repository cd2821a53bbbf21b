"""A link between two processes of a group: what is sent comes, and whoever waits at either end learns of the end."""

import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from llama4_dist.errors import UnavailableError
from llama4_dist.stages.links.frame import PREFIX_BYTES, MessageKind, prefix_of
from llama4_dist.stages.links.link import StageLink
from llama4_dist.stages.links.output_codec import OutputRules, encode_output
from llama4_dist.stages.links.ports import OutputInlet, OutputSender
from llama4_dist.stages.links.store import BOUNDS, LinkStore
from llama4_dist.stages.ports import StageOutput
from tests.waiting import wait_until

RULES = OutputRules(width=8, max_rows=1 << 16)


class Ends:
    """A link that sends outputs to an inlet."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.inlet = OutputInlet(RULES, "cpu")
        self.sender = StageLink(self.near, "after", send_timeout_s=2.0)
        self.receiver = StageLink(
            self.far, "before", bounds=self.inlet.bounds, deliver=self.inlet.deliver, on_lost=self.inlet.lose
        )
        self.outlet = OutputSender(self.sender)
        for link in (self.sender, self.receiver):
            link.start()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.sender.close()
    made.receiver.close()


def wait_for_loss(link: StageLink) -> UnavailableError:
    wait_until(lambda: link.lost is not None, "the link is lost")
    assert link.lost is not None
    return link.lost


def output(step: int, num_rows: int = 3) -> StageOutput:
    return StageOutput(step=step, microbatch=0, rows=torch.full((num_rows, 8), float(step)))


def test_outputs_come_in_order_also_when_they_are_larger_than_any_buffer(ends: Ends) -> None:
    """Nobody takes meanwhile: a stage that computes does not hold up the one before."""
    for step in range(4):
        ends.outlet.put(output(step, num_rows=1 << 16))
    for step in range(4):
        taken = ends.inlet.take(10.0)
        assert isinstance(taken.rows, torch.Tensor)
        assert torch.equal(taken.rows, torch.full((1 << 16, 8), float(step)))


def test_who_waits_for_a_process_that_ends_is_told_at_once(ends: Ends) -> None:
    threading.Timer(0.1, ends.near.shutdown, [socket.SHUT_RDWR]).start()
    begun_s = time.monotonic()
    for _ in range(2):  # the next to ask, too
        with pytest.raises(UnavailableError, match="before is gone") as caught:
            ends.inlet.take(60.0)
        assert caught.value.reason == "WORKER_LOST"
    assert time.monotonic() - begun_s < 5.0


def test_who_sends_to_a_process_that_ended_is_told(ends: Ends) -> None:
    ends.receiver.close()
    wait_for_loss(ends.sender)
    with pytest.raises(UnavailableError, match="after is gone") as caught:
        ends.outlet.put(output(1))
    assert caught.value.reason == "WORKER_LOST"


def test_what_came_before_the_end_can_still_be_taken(ends: Ends) -> None:
    ends.outlet.put(output(1))
    ends.sender.close()
    assert ends.inlet.take(10.0).step == 1
    with pytest.raises(UnavailableError, match="gone"):
        ends.inlet.take(10.0)


def test_a_process_that_takes_nothing_is_given_up_after_the_timeout() -> None:
    near, far = socket.socketpair()
    link = StageLink(near, "after", send_timeout_s=1.0)
    with pytest.raises(UnavailableError, match="after is gone"):
        OutputSender(link).put(output(1, num_rows=1 << 16))
    link.close()
    far.close()


@pytest.mark.parametrize("at", [0, 17, PREFIX_BYTES + 1, -1], ids=["magic", "checksum", "header", "payload"])
def test_a_damaged_message_closes_the_link_and_is_not_used(at: int) -> None:
    made = Ends()
    header, payload = encode_output(output(1))
    sent = bytearray(prefix_of(MessageKind.OUTPUT, 0, header, payload) + header + bytes(payload))
    sent[at] ^= 1
    made.near.sendall(sent)
    with pytest.raises(UnavailableError, match="sent what is no message"):
        made.inlet.take(10.0)
    wait_for_loss(made.sender)
    made.sender.close()
    made.receiver.close()


def test_a_message_that_is_repeated_is_refused() -> None:
    made = Ends()
    header, payload = encode_output(output(1))
    made.near.sendall(2 * (prefix_of(MessageKind.OUTPUT, 0, header, payload) + header + bytes(payload)))
    assert made.inlet.take(10.0).step == 1
    with pytest.raises(UnavailableError, match="SEQUENCE_WRONG"):
        made.inlet.take(10.0)
    made.sender.close()
    made.receiver.close()


def test_who_has_nothing_to_say_is_not_listened_to(ends: Ends) -> None:
    header, payload = encode_output(output(1))
    ends.far.sendall(prefix_of(MessageKind.OUTPUT, 0, header, payload))
    assert "KIND_WRONG" in wait_for_loss(ends.sender).message


def stores() -> tuple[LinkStore, LinkStore]:
    near, far = socket.socketpair()
    pair = LinkStore(), LinkStore()
    for store, connection in zip(pair, (near, far), strict=True):
        store.links.append(StageLink(connection, "rank", bounds=BOUNDS, deliver=store.deliver, on_lost=store.lose))
        store.links[0].start()
    return pair


def test_what_a_rank_sets_the_others_have() -> None:
    first, second = stores()
    threading.Timer(0.1, first.set, ["key", b"value"]).start()
    assert second.get("key") == b"value"
    assert second.check(["key"])
    assert not first.check(["other"])
    first.links[0].close()
    second.links[0].close()


def test_who_waits_for_a_rank_that_ends_is_told_at_once() -> None:
    first, second = stores()
    threading.Timer(0.1, first.links[0].close).start()
    with pytest.raises(RuntimeError, match="gone"):
        second.wait(["key"], timedelta(seconds=60))
    second.links[0].close()


def test_a_rank_that_says_nothing_is_not_waited_for_beyond_the_deadline() -> None:
    store = LinkStore(time.monotonic() + 0.2)
    with pytest.raises(RuntimeError, match="in time"):
        store.wait(["key"], timedelta(seconds=60))
