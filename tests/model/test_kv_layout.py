"""Pages hold layers of one kind, in equal groups; a sequence holds what its next positions see and no more."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.checkpoint.config_file import read_config
from llama4_dist.config import ModelConfig
from llama4_dist.model.kv_layout import KVGroup, KVLayout, layout_of, layouts_of, page_bytes, sequence_bytes
from llama4_dist.partition import layers_of_stages
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")
    return read_config(path)


def with_layers(config: ModelConfig, kinds: str, chunk_size: int = 16) -> ModelConfig:
    """A geometry with one layer per letter: c = chunked, f = full."""
    chunked = tuple(kind == "c" for kind in kinds)
    return replace(config, num_layers=len(kinds), chunked_layers=chunked, chunk_size=chunk_size)


def scout(config: ModelConfig) -> ModelConfig:
    """Scout's cache: 48 layers, every fourth sees everything, chunks of 8192, 8 key heads of 128."""
    return replace(with_layers(config, "cccf" * 12, chunk_size=8192), num_kv_heads=8, head_dim=128)


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ("cccf", [((3,), None), ((0,), 16), ((1,), 16), ((2,), 16)]),
        ("ccfccf", [((2, 5), None), ((0, 1), 16), ((3, 4), 16)]),
        ("cfcccf", [((1, 5), None), ((0, 2), 16), ((3, 4), 16)]),
        ("ffff", [((0, 1, 2, 3), None)]),
        ("cc", [((0, 1), 16)]),
        ("cfc", [((1,), None), ((0,), 16), ((2,), 16)]),
    ],
)
def test_layers_of_one_kind_share_pages_in_groups_of_one_size(
    tiny: ModelConfig, kinds: str, groups: list[tuple[tuple[int, ...], int | None]]
) -> None:
    layout = layout_of(with_layers(tiny, kinds))
    assert [(group.layers, group.chunk_size) for group in layout.groups] == groups
    for layer in range(len(kinds)):
        assert layout.groups[layout.group_of[layer]].layers[layout.index_in_group[layer]] == layer


@pytest.mark.parametrize(
    ("kinds", "num_stages", "groups"),
    [
        # Two even stages: the groups of one of them, each with its own layers.
        ("cccfcccf", 2, [[((3,), None), ((0,), 16), ((1,), 16), ((2,), 16)],
                         [((7,), None), ((4,), 16), ((5,), 16), ((6,), 16)]]),
        # A stage without full layers leaves their group empty, so that the numbers of pages mean the same.
        ("ccccff", 2, [[((), None), ((), None), ((0,), 16), ((1,), 16), ((2,), 16)],
                       [((4,), None), ((5,), None), ((3,), 16), ((), 16), ((), 16)]]),
        ("ccccffff", 2, [[((), None), ((0, 1, 2, 3), 16)], [((4, 5, 6, 7), None), ((), 16)]]),
    ],
)  # fmt: skip
def test_stages_have_the_same_groups_and_each_its_own_layers_in_them(
    tiny: ModelConfig, kinds: str, num_stages: int, groups: list[list[tuple[tuple[int, ...], int | None]]]
) -> None:
    layouts = layouts_of(with_layers(tiny, kinds), layers_of_stages(len(kinds), num_stages))
    assert [[(group.layers, group.chunk_size) for group in layout.groups] for layout in layouts] == groups


@given(kinds=st.text("cf", min_size=1, max_size=24), num_stages=st.integers(1, 6))
def test_any_cut_has_one_numbering_of_pages(tiny: ModelConfig, kinds: str, num_stages: int) -> None:
    stages = layers_of_stages(len(kinds), min(num_stages, len(kinds)))
    layouts = layouts_of(with_layers(tiny, kinds), stages)
    assert len({tuple(group.chunk_size for group in layout.groups) for layout in layouts}) == 1
    assert len({layout.layers_per_group for layout in layouts} | {0}) <= 2
    for layout, layers in zip(layouts, stages, strict=True):
        assert list(layout.group_of) == list(layers)
        for layer in layers:
            group = layout.groups[layout.group_of[layer]]
            assert group.layers[layout.index_in_group[layer]] == layer
            assert (group.chunk_size is not None) == (kinds[layer] == "c")
    counted = layouts[0].without_layers()
    assert counted.max_pages(1000, 5) == layouts[-1].max_pages(1000, 5)
    assert counted.layers_per_group == 0


def test_groups_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        KVLayout(groups=(KVGroup(layers=(0, 1), chunk_size=None), KVGroup(layers=(2,), chunk_size=4)))


def test_scout_needs_a_quarter_of_the_memory_at_a_million_tokens(tiny: ModelConfig) -> None:
    config = scout(tiny)
    # 2 (keys, values) x 8 heads x 128 wide x 2 bytes = 4096 bytes a token and layer.
    kept_by_full_layers = 12 * 4096 * 2**20
    kept_by_chunked_layers = 36 * 4096 * 8192
    held = sequence_bytes(config, 2**20, block_size=16, dtype_bytes=2)
    assert held == kept_by_full_layers + kept_by_chunked_layers == 52_747_567_104
    everything = replace(config, chunked_layers=(False,) * 48, chunk_size=None)
    assert sequence_bytes(everything, 2**20, block_size=16, dtype_bytes=2) == 48 * 4096 * 2**20 == 206_158_430_208
    assert page_bytes(config, block_size=16, dtype_bytes=2) == 12 * 4096 * 16


@given(
    num_cached=st.integers(0, 200),
    num_new=st.integers(1, 60),
    num_beyond=st.integers(0, 60),
    chunk_size=st.sampled_from([None, 1, 7, 16, 33]),
    block_size=st.sampled_from([1, 4, 5, 16]),
)
def test_blocks_cover_what_is_seen_and_what_comes(
    num_cached: int, num_new: int, num_beyond: int, chunk_size: int | None, block_size: int
) -> None:
    group, end = KVGroup(layers=(0,), chunk_size=chunk_size), num_cached + num_new
    num_known = end + num_beyond
    blocks = group.blocks(num_cached=num_cached, end=end, num_known=num_known, block_size=block_size)
    first_key = num_cached if chunk_size is None else num_cached % chunk_size
    seen = range(0 if chunk_size is None else num_cached - first_key, end)
    assert {position // block_size for position in seen} <= set(blocks)
    assert blocks.start == seen.start // block_size
    if chunk_size is None or chunk_size >= num_known:
        assert blocks.stop == -(-num_known // block_size)
    elif (end - 1) // chunk_size == num_cached // chunk_size:
        assert len(blocks) <= group.max_blocks(num_known, block_size)
