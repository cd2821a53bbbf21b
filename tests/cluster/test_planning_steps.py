"""The steps of a plan, each alone: shares of hosts, units on columns, order of an expert's hosts, exchanges."""

import itertools
import random
from typing import Any

import pytest

from cluster.planning.exchange import exchange
from cluster.planning.matching import Matching
from cluster.planning.movement import moves_between, released_by
from cluster.planning.preference import prefer
from cluster.planning.shares import share_out, share_out_apart

EQUAL = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
NODES = {"a": "left", "b": "left", "c": "left", "d": "right"}


def test_shares_follow_weights_and_limits() -> None:
    assert share_out(12, limits=dict.fromkeys("ab", 99), weights={"a": 2.0, "b": 1.0}, held={}) == {"a": 8, "b": 4}
    limits = {"a": 2, "b": 99, "c": 99, "d": 0}
    assert share_out(12, limits=limits, weights=EQUAL, held={}) == {"a": 2, "b": 5, "c": 5, "d": 0}
    assert share_out(500, limits=limits, weights=EQUAL, held={}) == limits


def test_a_remainder_stays_where_it_is() -> None:
    limits = dict.fromkeys("abcd", 99)
    assert share_out(6, limits=limits, weights=EQUAL, held={}) == {"a": 2, "b": 2, "c": 1, "d": 1}
    assert share_out(6, limits=limits, weights=EQUAL, held={"c": 9, "d": 2}) == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_no_node_gets_more_than_one_copy_of_each_while_others_have_memory() -> None:
    apart: dict[str, Any] = {"weights": EQUAL, "held": {}, "node_of": NODES, "node_limit": 6}
    assert share_out_apart(12, limits=dict.fromkeys("abcd", 9), **apart) == {"a": 2, "b": 2, "c": 2, "d": 6}
    limits = {"a": 9, "b": 9, "c": 9, "d": 4}
    assert share_out_apart(12, limits=limits, **apart) == {"a": 3, "b": 3, "c": 2, "d": 4}


def matching_of(need: list[int], room: list[int], most: list[list[int]], nodes: list[int], limit: int) -> Matching:
    num_nodes = max(nodes) + 1
    return Matching(
        need=need,
        room=room,
        group_of=nodes,
        least=[[0] * len(room) for _ in need],
        most=most,
        group_most=[[limit] * num_nodes for _ in need],
    )


def most_units(need: list[int], room: list[int], most: list[list[int]], nodes: list[int], limit: int) -> int:
    """The same by trying everything: how many units can lie somewhere."""
    cells = [(row, column) for row in range(len(need)) for column in range(len(room)) if most[row][column]]
    for size in range(min(sum(need), sum(room), len(cells)), 0, -1):
        for chosen in itertools.combinations(cells, size):
            rows = [[column for at, column in chosen if at == row] for row in range(len(need))]
            if (
                all(len(columns) <= need[row] for row, columns in enumerate(rows))
                and all(sum(at == column for _, at in chosen) <= room[column] for column in range(len(room)))
                and all(
                    sum(nodes[column] == node for column in columns) <= limit for columns in rows for node in set(nodes)
                )
            ):
                return size
    return 0


def test_units_are_laid_as_many_as_trying_everything_finds() -> None:
    chance = random.Random(7)
    for _ in range(150):
        num_rows, num_columns = chance.randint(1, 3), chance.randint(1, 4)
        need = [chance.randint(0, 3) for _ in range(num_rows)]
        room = [chance.randint(0, 2) for _ in range(num_columns)]
        most = [[chance.choice([0, 1, 1]) for _ in range(num_columns)] for _ in range(num_rows)]
        nodes, limit = [column % 2 for column in range(num_columns)], chance.choice([1, 2])
        matching = matching_of(need, room, most, nodes, limit)
        matching.augment(cheap=lambda row, column: (row + column) % 2 == 0)
        assert sum(map(sum, matching.count)) == most_units(need, room, most, nodes, limit)
        assert min(matching.room) >= 0
        assert min(matching.need) >= 0
        for row, counts in enumerate(matching.count):
            assert all(count <= bound for count, bound in zip(counts, most[row], strict=True))
            assert all(sum(counts[node::2]) <= limit for node in range(2))


def test_a_unit_reaches_room_by_way_of_cheap_cells() -> None:
    """Row 0 finds column 0 full; handing a unit of row 1 or 2 on makes room, and row 2 may stay among cheap cells."""
    matching = matching_of([1, 1, 1], [2, 1], [[1, 0], [1, 1], [1, 1]], [0, 0], 1)
    matching.put(1, 0)
    matching.put(2, 0)
    matching.augment(cheap=lambda row, column: (row, column) != (1, 1))
    assert matching.count == [[1, 0], [1, 0], [0, 1]]


def test_first_choices_are_shifted_along_a_chain() -> None:
    """The last expert is on host 0 alone, which gets rid of its first one only if all three others shift."""
    holders = [(0, 1), (1, 2), (2, 3), (0,)]
    order = prefer(holders, [1.0] * 4, [1.0] * 4, current=[(0,), (1,), (2,), ()], turn=0)
    assert [hosts[0] for hosts in order] == [1, 2, 3, 0]


def test_what_prefers_a_host_falls_to_different_others() -> None:
    holders = [(0, 1, 2, 3)] * 8
    order = prefer(holders, [1.0] * 8, [1.0] * 4, current=[()] * 8, turn=0)
    for lost in range(4):
        seconds = [hosts[1] for hosts in order if hosts[0] == lost]
        assert len(seconds) == len(set(seconds)) == 2


def test_a_host_stays_preferred_where_another_is_as_good() -> None:
    order = prefer([(0, 1), (0, 1)], [1.0, 1.0], [1.0, 1.0], current=[(1, 0), (0, 1)], turn=0)
    assert [hosts[0] for hosts in order] == [1, 0]


def test_an_exchange_takes_the_pair_that_evens_out_best_and_only_if_it_gains_enough() -> None:
    loads = [8.0, 5.0, 4.0, 1.0]

    def exchanged(min_gain: float) -> list[set[int]]:
        holders = [{0}, {0}, {1}, {1}]
        exchange(holders, loads, [1.0, 1.0], lambda expert, source, target: True, min_gain)
        return holders

    assert exchanged(0.01) == [{0}, {1}, {1}, {0}]
    # 13 and 5 become 9 and 9: 4 off the busiest, where the mean is 9.
    assert exchanged(0.44) == [{0}, {1}, {1}, {0}]
    assert exchanged(0.45) == [{0}, {0}, {1}, {1}]


def test_sources_take_turns() -> None:
    pairs = [(0, expert) for expert in range(4)]
    moves = moves_between(dict.fromkeys(pairs, ("a", "b")), dict.fromkeys(pairs, ("a", "b", "c")))
    assert [move.source for move in moves] == ["a", "b", "a", "b"]
    assert [move.target for move in moves] == ["c"] * 4


@pytest.mark.parametrize(("hosts", "released"), [("ab", {"a": ((0, 0),)}), ("b", {})])
def test_only_hosts_that_stay_release(hosts: str, released: dict[str, object]) -> None:
    assert released_by(hosts, {(0, 0): ("a",), (0, 1): ("b",)}, {(0, 0): ("b",), (0, 1): ("b",)}) == released
