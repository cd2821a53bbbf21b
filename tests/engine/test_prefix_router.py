"""Which engine a request is given to, by what it begins with and by who has how much to do."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.engine.prefix_router import BLOCK_SIZE, MAX_NAMES, PrefixRouter, preferred
from tests.engine.sequences import request

NAMES = "abcd"
LONG = tuple(range(3 * BLOCK_SIZE + 5))


@pytest.mark.parametrize(
    ("matches", "loads", "expected"),
    [
        ([], {"a": 2, "b": 1, "c": 3}, ["b", "a", "c"]),
        ([["c"]], {"a": 2, "b": 2, "c": 2}, ["c", "a", "b"]),
        # 1.25 x (9 + 1) / 3 = 4.2: five is the bound, which c has reached.
        ([["c"]], {"a": 2, "b": 2, "c": 5}, ["a", "b", "c"]),
        ([["c"], ["b", "c"]], {"a": 1, "b": 3, "c": 5}, ["b", "a", "c"]),
        ([["gone"]], {"a": 1, "b": 0}, ["b", "a"]),
        ([["a"]], {}, []),
    ],
)
def test_a_match_comes_first_unless_it_has_more_than_its_share(
    matches: list[list[str]], loads: dict[str, int], expected: list[str]
) -> None:
    assert preferred(matches, loads) == expected


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=200))
def test_no_engine_gets_more_than_its_share_however_alike_requests_are(steps: list[tuple[int, bool]]) -> None:
    router, running = PrefixRouter(), dict.fromkeys(NAMES, 0)
    for number, (kind, ends) in enumerate(steps):
        made = request(f"r{number}", (kind,) * (2 * BLOCK_SIZE))
        (name, *rest) = router.order(made, running)
        assert sorted([name, *rest]) == sorted(running), "each engine is asked once"
        running[name] += 1
        least = min(running.values())
        assert running[name] <= max(least + 1, math.ceil(1.25 * sum(running.values()) / len(NAMES)))
        router.note(made, name)
        if ends:
            running[name] -= 1


def test_the_longest_start_of_the_same_tenant_wins() -> None:
    router, loads = PrefixRouter(), dict.fromkeys(NAMES, 0)
    router.note(request("x", LONG[: BLOCK_SIZE + 3]), "d")
    router.note(request("x", LONG), "c")
    router.note(request("x", (*LONG[: 2 * BLOCK_SIZE], *LONG)), "b")
    assert router.order(request("y", (*LONG, 7, 7)), loads)[0] == "c"
    assert router.order(request("y", LONG[: 2 * BLOCK_SIZE]), loads)[0] == "b"
    assert router.order(request("y", LONG, tenant="other"), loads) == list(NAMES)
    assert router.order(request("y", LONG[: BLOCK_SIZE - 1]), loads) == list(NAMES)


def test_the_table_is_bounded_and_forgets_what_was_not_used() -> None:
    router, loads = PrefixRouter(max_entries=6), dict.fromkeys("edcba", 0)
    router.note(request("x", LONG), "a")
    for name in "bcde" * 2:
        router.note(request("x", (99, *LONG)), name)
    assert len(router) == 6
    assert router.order(request("x", LONG), loads)[0] == "a"
    assert router.order(request("x", (99, *LONG)), loads)[:MAX_NAMES] == list("edcb")
    router.note(request("x", (98, *LONG)), "e")
    assert len(router) == 6
    assert router.order(request("x", LONG), {"b": 0, "a": 0})[0] == "b", "what was used least recently is forgotten"
