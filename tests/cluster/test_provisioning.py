"""The book of processes that are wanted and unwanted, between those who order and whoever carries that out."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from cluster.control_plane.members import Members
from cluster.control_plane.provisioning import Provisioning
from cluster.handle import Handle
from cluster.worker import Role
from llama4_dist.errors import RequestCancelledError, UnavailableError


class Process:
    """A handle that is never called."""

    role = Role.EXPERT

    def __init__(self, worker: str) -> None:
        self.worker = worker

    def call(self, method: str, *arguments: object) -> Any:
        raise AssertionError(method)

    def kill(self) -> None:
        raise AssertionError


def ordering(book: Provisioning, *workers: str, check: Callable[[], None] = lambda: None) -> tuple[Any, list[Any]]:
    """Obtain in a thread; return once the order is there."""
    outcome: list[Any] = []

    def obtain() -> None:
        try:
            outcome.append(book.obtain(workers, Role.EXPERT, timeout_s=10, check=check))
        except Exception as error:  # noqa: BLE001 - looked at by the test
            outcome.append(error)

    thread = threading.Thread(target=obtain)
    thread.start()
    with book._changed:
        assert book._changed.wait_for(lambda: set(workers) <= book._wanted.keys() or outcome, 10)
    return thread, outcome


def test_what_is_ordered_is_asked_for_until_it_is_there() -> None:
    book = Provisioning()
    thread, outcome = ordering(book, "a", "b")
    assert book.orders() == book.orders() == ({"a": Role.EXPERT, "b": Role.EXPERT}, ())
    first, second = Process("a"), Process("b")
    book.provide(first)
    assert book.orders() == ({"b": Role.EXPERT}, ())
    book.provide(second)
    thread.join(60)
    assert outcome == [[first, second]]
    assert book.orders() == ({}, ())


def test_one_refusal_gives_the_others_back() -> None:
    book = Provisioning()
    thread, outcome = ordering(book, "a", "b")
    book.provide(Process("a"))
    book.refuse("b", UnavailableError("no room"))
    thread.join(60)
    assert str(outcome[0]) == "no room"
    assert book.orders() == ({}, ("a",))
    book.ended("a")
    assert book.orders() == ({}, ())


def test_what_comes_too_late_is_not_wanted() -> None:
    book = Provisioning()
    with pytest.raises(UnavailableError, match="a did not start in 0 s") as caught:
        book.obtain(["a"], Role.EXPERT, timeout_s=0.0, check=lambda: None)
    assert caught.value.reason == "INSUFFICIENT_CAPACITY"
    book.provide(Process("a"))
    book.refuse("a", UnavailableError("nor that"))
    assert book.orders() == ({}, ("a",))


def test_a_check_that_raises_ends_the_wait() -> None:
    book = Provisioning()

    def check() -> None:
        raise RequestCancelledError("stop")

    with pytest.raises(RequestCancelledError):
        book.obtain(["a"], Role.EXPERT, timeout_s=10, check=check)
    assert book.orders() == ({}, ())


def test_dismissing_waits_until_the_processes_are_gone_and_names_those_that_are_not() -> None:
    book = Provisioning()
    assert book.dismiss(["a", "b"], timeout_s=0.0) == ["a", "b"]
    assert book.orders() == ({}, ("a", "b"))
    late: list[list[str]] = []
    waiter = threading.Thread(target=lambda: late.append(book.dismiss(["a", "b"], timeout_s=10)))
    waiter.start()
    book.ended("a")
    book.ended("b")
    waiter.join(60)
    assert late == [[]]


def test_an_order_of_an_id_that_is_still_to_end_keeps_both() -> None:
    book = Provisioning()
    book.dismiss(["a"], timeout_s=0.0)
    thread, outcome = ordering(book, "a")
    assert book.orders() == ({"a": Role.EXPERT}, ("a",))
    book.ended("a")
    process = Process("a")
    book.provide(process)
    thread.join(60)
    assert outcome == [[process]]
    assert book.orders() == ({}, ())


def test_a_member_is_dropped_by_process_and_not_by_name() -> None:
    old, new = Process("a"), Process("a")
    members = Members([old])
    members.add([new])
    assert members.drop([old]) == []
    assert members.all == [new]
    assert members.drop([new]) == ["a"]
    assert "a" not in members


def test_members_that_come_and_go_in_many_threads_are_all_there_in_the_end() -> None:
    members = Members([])

    def work(index: int) -> None:
        stays: Handle = Process(f"stays-{index}")
        members.add([stays])
        for turn in range(200):
            passing: Handle = Process(f"passing-{index}-{turn}")
            members.add([passing])
            members.drop([passing])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.worker for one in members.all) == [f"stays-{index}" for index in range(4)]
