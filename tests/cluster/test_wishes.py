"""Who comes, who goes, and where: small enough to be checked by hand."""

import pytest

from cluster.control_plane.wishes import Wish, leaving_first, likely_nodes, new_names, order, scaled, without
from cluster.driver.nodes import Node, emptiest

NODES = {"expert-0": "a", "expert-1": "b", "expert-2": "a", "expert-10": "b", "expert-3": "c"}


def test_new_hosts_get_the_lowest_free_names() -> None:
    assert new_names({"expert-0", "expert-2"}, 3) == ("expert-1", "expert-3", "expert-4")
    wish = scaled({"expert-1": "a"}, 3)
    assert wish == Wish(staying=("expert-1",), joining=("expert-0", "expert-2"))
    assert wish.hosts == ("expert-1", "expert-0", "expert-2")


def test_hosts_leave_from_the_node_with_the_fewest_and_the_youngest_first() -> None:
    assert leaving_first(NODES) == ("expert-3", "expert-10", "expert-1", "expert-2", "expert-0")
    assert scaled(NODES, 3) == Wish(staying=("expert-0", "expert-1", "expert-2"), leaving=("expert-3", "expert-10"))
    one_node = dict.fromkeys(NODES, "a")
    assert scaled(one_node, 4).leaving == ("expert-10",)


def test_as_many_as_there_are_changes_nothing() -> None:
    assert scaled(NODES, 5) == Wish(staying=("expert-0", "expert-1", "expert-2", "expert-3", "expert-10"))


def test_those_named_leave() -> None:
    assert without(NODES, ["expert-2"]).leaving == ("expert-2",)
    assert without(NODES, ["expert-2"]).staying == ("expert-0", "expert-1", "expert-3", "expert-10")


def test_hosts_are_ordered_by_number() -> None:
    assert sorted(["expert-10", "expert-9", "odd"], key=order) == ["odd", "expert-9", "expert-10"]


def test_new_hosts_are_expected_where_there_are_fewest() -> None:
    assert likely_nodes(NODES, ["x", "y", "z"]) == NODES | {"x": "c", "y": "a", "z": "b"}
    assert likely_nodes({}, ["x"]) == {"x": ""}


def node(name: str, *, cpus: float = 4, held: float = 0, num_of_role: int = 0, **labels: str) -> Node:
    return Node(node=name, offers={"CPU": cpus}, labels=labels, held={"CPU": held}, num_of_role=num_of_role)


def test_a_worker_goes_to_the_node_with_the_fewest_of_its_role_that_has_room() -> None:
    nodes = [node("a", num_of_role=1), node("b", num_of_role=2), node("c", held=3.5)]
    assert emptiest(nodes, {"CPU": 1}, {}) == "a"
    assert emptiest(nodes, {"CPU": 0.5}, {}) == "c"
    assert emptiest([node("b"), node("a")], {"CPU": 1}, {}) == "a"


@pytest.mark.parametrize("bundle", [{"CPU": 5}, {"GPU": 1}])
def test_without_room_or_choice_ray_decides(bundle: dict[str, float]) -> None:
    assert emptiest([node("a"), node("b")], bundle, {}) is None
    assert emptiest([node("a")], {"CPU": 1}, {}) is None


def test_labels_are_kept() -> None:
    nodes = [node("a", pool="x"), node("b", num_of_role=9, pool="y")]
    assert emptiest(nodes, {"CPU": 1}, {"pool": "y"}) == "b"
    assert emptiest(nodes, {"CPU": 1}, {"pool": "z"}) is None
