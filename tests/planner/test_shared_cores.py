"""Steps on shared cores: what adds up, what overlaps, and what each constant is for."""

from dataclasses import replace

import pytest

from benchmarks.calibration.fit import START, geometry
from llama4_dist.planner.multinomial import expected_distinct, zipf
from llama4_dist.planner.shared_cores import CoreLayout, core_step

BASE = geometry("base")
ALONE = CoreLayout(cores=2, rows=8, context=64, attention_threads=2)
FREE = replace(START, row_s=0.0, layer_s=0.0, sequence_s=0.0, step_s=0.0, message_s=0.0, wire_s=0.0, stream_s=0.0)


def test_a_step_in_one_process_reads_and_computes_what_can_be_counted_by_hand() -> None:
    """4 layers of width 768: attention 768 x (2 x 768 + 2 x 256), experts 3 x 768 x 1024, head 8192 x 768."""
    attention, expert, head = 768 * 2048, 3 * 768 * 1024, 8192 * 768
    distinct = expected_distinct(8, (1 / 16,) * 16)
    weights = 4 * (4 * attention + 4 * expert + head)
    keys = 4 * 8 * 64 * 2 * 256 * 4
    products = 2 * 8 * (4 * attention + 4 * 2 * expert + head) + 4 * 4 * 8 * 64 * 768
    expected = weights * FREE.weight_s + 4 * 4 * distinct * expert * FREE.expert_s
    expected += keys * FREE.kv_s + products * FREE.flop_s
    assert core_step(BASE, FREE, ALONE).step_s == pytest.approx(expected)


def test_one_core_is_slower_by_its_share() -> None:
    one = core_step(BASE, FREE, replace(ALONE, attention_threads=1))
    assert one.step_s == pytest.approx(core_step(BASE, FREE, ALONE).step_s / FREE.one_core)


def test_hosts_on_the_same_cores_take_at_least_all_work_together() -> None:
    """Two hosts and the attention worker share two cores: no number of processes makes less work of it."""
    alone = core_step(BASE, FREE, ALONE)
    for hosts in (1, 2, 4, 8):
        shared = core_step(BASE, FREE, replace(ALONE, hosts=hosts, attention_threads=1))
        assert shared.networks_s >= alone.networks_s * (1 - 1e-9)


def test_frames_rows_and_streams_cost_what_they_are_said_to() -> None:
    cluster = replace(ALONE, hosts=2, attention_threads=1)
    before = core_step(BASE, FREE, cluster)
    hosts = expected_distinct(8, (0.5, 0.5))
    with_frames = core_step(BASE, replace(FREE, message_s=1e-3), cluster)
    assert with_frames.networks_s - before.networks_s == pytest.approx(4 * 2 * hosts * 1e-3)
    with_rows = core_step(BASE, replace(FREE, wire_s=1e-9), cluster)
    assert with_rows.networks_s - before.networks_s == pytest.approx(4 * 2 * 8 * 768 * 4 * 1e-9)
    with_stream = core_step(BASE, replace(FREE, stream_s=1e-3), cluster)
    assert with_stream.rest_s - before.rest_s == pytest.approx(1e-3)


def test_more_experts_are_read_as_more_are_hit() -> None:
    many = geometry("many experts")
    more = core_step(many, FREE, ALONE).networks_s - core_step(BASE, FREE, ALONE).networks_s
    distinct = expected_distinct(8, zipf(32, 0.0)) - expected_distinct(8, zipf(16, 0.0))
    assert more == pytest.approx(4 * distinct * BASE.expert_parameters * 4 * FREE.expert_s)
