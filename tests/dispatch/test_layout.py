"""The layout of copies: a permutation with one contiguous slice per host and one run per expert."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.dispatch.layout import Layout, NoReplicaError, Share, lay_out, lay_out_tensor, split, view_layer
from llama4_dist.dispatch.layout import cut as cut_share
from llama4_dist.dispatch.routing_table import Replica
from tests.dispatch.fakes import whole


@st.composite
def layers_and_experts(draw: st.DrawFn) -> tuple[dict[int, tuple[Replica, ...]], np.ndarray]:
    num_experts = draw(st.integers(1, 20))
    hosts = [f"host-{index}" for index in range(draw(st.integers(1, 8)))]
    replicas = {}
    for expert in range(num_experts):
        replicas[expert] = whole(draw(st.sampled_from(hosts)))
    experts = draw(st.lists(st.integers(0, num_experts - 1), max_size=60))
    return replicas, np.array(experts, dtype=np.int64)


def positions_of(share: Share, layout: Layout) -> np.ndarray:
    return np.arange(len(layout.order_N))[share.positions]


@given(layers_and_experts())
def test_the_order_is_a_permutation_and_every_copy_is_asked_for_once(case) -> None:
    replicas, experts_N = case
    layout = lay_out(view_layer(replicas), experts_N)
    assert sorted(layout.order_N.tolist()) == list(range(len(experts_N)))
    asked = [int(position) for share in layout.shares for position in positions_of(share, layout)]
    assert sorted(asked) == list(range(len(experts_N)))


@given(layers_and_experts())
def test_each_row_goes_to_the_host_of_its_expert_in_runs_of_one_expert(case) -> None:
    replicas, experts_N = case
    layout = lay_out(view_layer(replicas), experts_N)
    for share in layout.shares:
        experts = experts_N[layout.order_N[positions_of(share, layout)]].tolist()
        assert experts == [expert for expert, count in share.groups for _ in range(count)]
        assert len({expert for expert, _ in share.groups}) == len(share.groups)
        for expert in set(experts):
            assert replicas[expert][0].host == share.host


@given(layers_and_experts())
def test_a_host_gets_one_contiguous_slice_and_copies_keep_their_order(case) -> None:
    replicas, experts_N = case
    layout = lay_out(view_layer(replicas), experts_N)
    assert len({share.host for share in layout.shares}) == len(layout.shares)
    assert all(isinstance(share.positions, slice) for share in layout.shares)
    for expert in set(experts_N.tolist()):
        copies = [copy for copy in layout.order_N.tolist() if experts_N[copy] == expert]
        assert copies == sorted(copies)


@given(layers_and_experts(), st.integers(1, 7))
def test_split_keeps_rows_and_experts_and_bounds_every_frame(case, max_rows: int) -> None:
    replicas, experts_N = case
    layout = lay_out(view_layer(replicas), experts_N)
    for share in layout.shares:
        parts = list(split(share, max_rows))
        assert all(1 <= part.num_rows <= max_rows for part in parts)
        assert np.array_equal(
            np.concatenate([positions_of(part, layout) for part in parts]), positions_of(share, layout)
        )
        for part in parts:
            experts = experts_N[layout.order_N[positions_of(part, layout)]].tolist()
            assert experts == [expert for expert, count in part.groups for _ in range(count)]


@given(layers_and_experts(), st.integers(1, 7))
def test_a_cut_keeps_rows_in_order_and_no_expert_in_two_parts(case, part_rows: int) -> None:
    replicas, experts_N = case
    for share in lay_out(view_layer(replicas), experts_N).shares:
        if share.num_rows < 2 * part_rows:
            continue
        parts = list(cut_share(share, part_rows))
        groups = tuple(group for part in parts for group in part.groups)
        assert groups == share.groups
        assert all(part.num_rows == sum(count for _, count in part.groups) > 0 for part in parts)
        assert np.array_equal(
            np.concatenate([np.arange(len(experts_N))[part.positions] for part in parts]),
            np.arange(len(experts_N))[share.positions],
        )


def test_a_cut_makes_parts_of_about_the_size_asked() -> None:
    groups = tuple((expert, 16) for expert in range(16))
    share = Share("a", slice(0, 256), groups, 256)
    assert [part.num_rows for part in cut_share(share, 128)] == [128, 128]
    assert [part.num_rows for part in cut_share(share, 100)] == [128, 128]
    assert [part.num_rows for part in cut_share(share, 60)] == [64] * 4
    one_expert = Share("a", slice(0, 256), ((3, 256),), 256)
    assert list(cut_share(one_expert, 64)) == [one_expert]


@pytest.mark.parametrize("experts", [[0, 1, -1], [2], [-1], [0, 7]])
def test_an_expert_the_model_does_not_have_is_refused(experts: list[int]) -> None:
    view = view_layer({0: whole("a"), 1: whole("a")})
    with pytest.raises(ValueError, match="outside"):
        lay_out(view, np.array(experts))


@pytest.mark.parametrize("experts", [[1], [0, 1, 0]])
def test_an_expert_without_replica_is_named(experts: list[int]) -> None:
    with pytest.raises(NoReplicaError) as caught:
        lay_out(view_layer({0: whole("a"), 1: ()}), np.array(experts))
    assert caught.value.expert == 1


def test_preference_and_exclusion_choose_the_replica() -> None:
    replicas = {0: whole("a", "b", "c")}
    assert view_layer(replicas).destinations == (("a", 0),)
    assert view_layer(replicas, avoided={"a"}).destinations == (("b", 0),)
    assert view_layer(replicas, avoided={"b"}, excluded={("c", 0)}).destinations == (("a", 0),)
    assert view_layer(replicas, excluded={("a", 0), ("b", 0), ("c", 0)}).destinations == ()
    assert view_layer(replicas, excluded={("a", 1)}).destinations == (("a", 0),)


@given(layers_and_experts())
def test_the_native_way_lays_out_alike_whatever_object_names_a_host(case) -> None:
    replicas, experts_N = case
    # As in a table that came by a socket: an object of its own for every host of every expert.
    apart = {expert: whole("".join(list(ones[0].host))) for expert, ones in replicas.items()}
    expected = lay_out(view_layer(replicas), experts_N)
    layout = lay_out_tensor(view_layer(apart), torch.from_numpy(experts_N.reshape(-1, 1)))
    assert layout.shares == expected.shares
    assert layout.order_N.tolist() == expected.order_N.tolist()
