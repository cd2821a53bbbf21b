"""The heatmap as text: every expert is found, the digits can be checked by hand, and it fits the terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from llama4_dist.cli.heatmap import heatmap, host_bars, level
from llama4_dist.client.admin_experts import ExpertLoad, HostLoad


def drawn(shown: RenderableType, *, width: int, colour: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(shown)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def load(layer: int, expert: int, rows_per_s: float, host: str = "a") -> ExpertLoad:
    return ExpertLoad(host=host, layer=layer, expert=expert, rows_per_s=rows_per_s, rows=int(rows_per_s))


def model(num_layers: int, num_experts: int) -> list[ExpertLoad]:
    """Expert e of every layer has e rows a second."""
    return [load(layer, expert, float(expert)) for layer in range(num_layers) for expert in range(num_experts)]


@pytest.mark.parametrize(("rate", "digit"), [(0, 0), (0.001, 1), (1, 1), (1.01, 2), (4.5, 5), (8.99, 9), (9, 9)])
def test_a_digit_is_the_share_of_the_busiest_in_ninths(rate: float, digit: int) -> None:
    assert level(rate, 9.0) == digit


def test_rows_are_layers_and_columns_experts() -> None:
    lines = drawn(
        heatmap([load(0, 0, 9.0), load(0, 1, 1.0), load(2, 0, 0.0), load(2, 1, 4.5)], width=80, height=None), width=80
    )
    assert lines[1].split() == ["0", "9", "1", "1.80"]
    assert lines[2].split() == ["2", "·", "5", "2.00"]
    assert "up to 9 rows/s" in lines[3]


def test_copies_of_an_expert_are_added() -> None:
    lines = drawn(
        heatmap([load(0, 0, 3.0, "a"), load(0, 0, 6.0, "b"), load(0, 1, 1.0)], width=80, height=None), width=80
    )
    assert lines[1].split()[1:3] == ["9", "1"]


def test_128_experts_fit_120_columns_and_each_has_its_cell() -> None:
    lines = drawn(heatmap(model(3, 128), width=120, height=None), width=120)
    assert max(map(len, lines)) <= 120
    bands = [lines[1:4], lines[5:8]]
    for layer in range(3):
        cells = "".join(band[layer][6:70] for band in bands)
        assert cells == "".join(str(level(expert, 127.0) or "·") for expert in range(128))
    assert lines[0].split()[:9] == ["layer", *(str(8 * mark) for mark in range(8))]
    assert lines[4].split()[1] == "64"


def test_where_the_height_is_short_neighbours_share_a_cell() -> None:
    lines = drawn(heatmap(model(24, 128), width=120, height=40), width=120)
    assert len(lines) <= 40
    cells = lines[1][6:].split()[0]
    assert len(cells) == 64
    assert cells == "".join(str(level(2 * pair + 1, 127.0)) for pair in range(64))
    assert "busiest of 2 experts" in lines[-1]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("num_experts", [1, 2, 16, 128])
def test_nothing_is_wider_than_the_terminal(width: int, num_experts: int) -> None:
    for line in drawn(heatmap(model(2, num_experts), width=width, height=None), width=width)[:-1]:
        assert len(line) <= width


def test_an_idle_cluster_is_drawn_too() -> None:
    lines = drawn(heatmap([load(0, expert, 0.0) for expert in range(4)], width=80, height=None), width=80)
    assert lines[1].split() == ["0", "·", "·", "·", "·", "0.00"]


def test_colour_adds_to_the_digits_and_does_not_replace_them() -> None:
    lines = drawn(heatmap([load(0, 0, 9.0)], width=80, height=None), width=80, colour=True)
    assert " 9 " in lines[1]
    assert "48;2;215;48;31" in lines[1]


def test_a_host_has_a_bar_as_long_as_its_share() -> None:
    hosts = [
        HostLoad(host=f"expert-{index}", incarnation=1, rows_per_s=rate, busy=0.5, queue_depth=2, bytes_held=2048)
        for index, rate in enumerate((100.0, 50.0, 0.0))
    ]
    lines = drawn(host_bars(hosts, width=120), width=120)
    assert [line.count("█") for line in lines[:3]] == [30, 15, 0]
    assert "busy  50%" in lines[0]
    assert "2.0 KiB" in lines[0]


def test_an_expert_that_is_cut_has_a_cell_for_each_slice_and_its_number() -> None:
    slices = [
        replace(load(0, expert, 9.0 if (expert, index) == (2, 1) else 1.0), slice=index)
        for expert in range(6)
        for index in range(2)
    ]
    ruler, row, *_ = drawn(heatmap(slices, width=80, height=None), width=80)
    assert ruler.split()[:3] == ["layer", "0.0", "4.0"]
    assert row.split()[1:13] == ["1"] * 5 + ["9"] + ["1"] * 6
    crowded = [replace(load(0, expert, 1.0), slice=index) for expert in range(128) for index in range(4)]
    assert "the busiest of 5 slices" in drawn(heatmap(crowded, width=120, height=5), width=120)[-1]


def test_a_host_says_how_much_it_has_in_memory_where_that_is_bounded() -> None:
    host = HostLoad(host="e", incarnation=1, rows_per_s=1.0, busy=0.0, queue_depth=0, bytes_held=10)
    assert "in memory" not in host_bars([host], width=120).plain
    bounded = replace(host, num_resident=3, num_mapped=9, residency_hits=1, residency_misses=3)
    assert "3 of 12 in memory  hits 25%" in host_bars([bounded], width=120).plain
