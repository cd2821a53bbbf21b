"""Who a process of a group says it is: what is not alike is refused, and told how to be mended."""

from dataclasses import replace

import msgpack
import pytest

from llama4_dist.errors import HandshakeError
from llama4_dist.stages.links.frame import VERSION
from llama4_dist.stages.links.hello import GroupIdentity, check_alike, hello_of, read_hello

OWN = GroupIdentity(
    group="attention-0", formation=3, model_hash="m", num_stages=2, num_ranks=1, num_pages=9, block_size=16,
    dtype="bfloat16", weights="stored", arithmetic="native",
)  # fmt: skip


def test_a_hello_comes_back_as_it_was_sent() -> None:
    hello = hello_of(OWN, purpose="plans", stage=2, rank=0)
    assert read_hello(hello.pack()) == hello
    assert hello.messages == VERSION
    check_alike(hello, OWN)


def test_who_speaks_another_version_of_the_messages_is_refused_before_one_is_sent() -> None:
    older = hello_of(replace(OWN, messages=VERSION - 1), purpose="plans", stage=2, rank=0)
    with pytest.raises(HandshakeError, match="from one build") as caught:
        check_alike(read_hello(older.pack()), OWN)
    assert caught.value.reason == "MESSAGES_DIFFERS"


def test_a_hello_that_does_not_say_its_version_is_refused() -> None:
    values = msgpack.unpackb(hello_of(OWN, purpose="plans", stage=2, rank=0).pack())
    values.remove(VERSION)  # as the first version had it
    with pytest.raises(HandshakeError) as caught:
        read_hello(msgpack.packb(values))
    assert caught.value.reason == "HELLO_SHAPE"
