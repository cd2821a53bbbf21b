"""Experts cut into slices over real Ray actors: the tokens of one process, through deaths, growth and drains."""

import os
import signal
from pathlib import Path

import pytest
import torch

from cluster.operation import Operation, Phase
from cluster.ray_engine import RayEngine
from cluster.worker import Role, State
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from tests.checkpoints import make_checkpoint
from tests.cluster.running import Collector, reference, some_requests
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

OPTIONS = EngineOptions(num_blocks=128, max_num_seqs=8)
SLICES = 2
PAIRS = {(layer, unit) for layer in range(4) for unit in range(16 * SLICES)}


def end_of(engine: RayEngine, operation: Operation) -> Operation:
    wait_until(lambda: engine.control.operation(operation.name).phase.final)
    return engine.control.operation(operation.name)


def test_a_host_killed_under_load_costs_no_token_and_its_slices_come_back(model_dir: Path) -> None:
    requests, collector = some_requests("kill", max_tokens=120), Collector()
    expected = reference(model_dir, requests, expert_slices=SLICES)
    engine = RayEngine(model_dir, num_expert_hosts=3, num_replicas=2, expert_slices=SLICES, options=OPTIONS)
    try:
        engine.start(collector.collect)
        before = {worker.worker: worker for worker in engine.status()}
        held = [set(before[f"expert-{index}"].experts) for index in range(3)]
        assert held[0] | held[1] | held[2] == PAIRS
        assert sum(map(len, held)) == 2 * len(PAIRS)
        view = engine.control.placement()
        assert (view.num_slices, view.slice_bytes * 2) == (SLICES, view.expert_bytes)
        for request in requests:
            engine.submit(request)
        collector.wait_for_tokens("kill0", 2)
        os.kill(before["expert-1"].pid, signal.SIGKILL)
        collector.wait_for([request.request_id for request in requests])
        assert {name: tuple(tokens) for name, tokens in collector.tokens.items()} == expected

        def is_whole() -> bool:
            now = {worker.worker: worker for worker in engine.status()}
            host = now["expert-1"]
            is_new = host.state is State.READY and host.pid != before["expert-1"].pid
            return is_new and all(len(on) == 2 for on in engine.control.placement().hosts_of.values())

        wait_until(is_whole)
        wait_until(lambda: not engine.control.view().operation)
        up = end_of(engine, engine.control.scale(4))
        assert up.phase is Phase.DONE
        drained = end_of(engine, engine.control.drain("expert-0"))
        assert drained.phase is Phase.DONE
        assert {one.worker for one in engine.status() if one.role is Role.EXPERT} == {
            "expert-1",
            "expert-2",
            "expert-3",
        }
        down = end_of(engine, engine.control.scale(1))
        assert down.phase is Phase.DONE
        later = some_requests("later")
        assert collector.run(engine, later) == reference(model_dir, later, expert_slices=SLICES)
    finally:
        engine.close()


def test_logits_have_the_bits_of_one_process_with_the_same_cut(model_dir: Path) -> None:
    local = build_single_process(model_dir, expert_slices=3, num_threads=1)
    local.start(lambda outputs: None)
    engine = RayEngine(model_dir, num_expert_hosts=2, num_replicas=1, expert_slices=3, options=OPTIONS)
    try:
        engine.start(lambda outputs: None)
        assert torch.equal(engine.score(range(40)), local.score(range(40)))
    finally:
        engine.close()
        local.close()


def test_hosts_that_have_no_room_for_one_whole_expert_serve_slices(tmp_path: Path) -> None:
    """Two experts of one layer in four slices each; three hosts have room for three slices."""
    path = make_checkpoint(
        tmp_path, "scout", num_local_experts=2, num_hidden_layers=2, interleave_moe_layer_step=2, no_rope_layers=[1, 0]
    )
    capacity = 3 * (3 * 64 * 32 * 4)  # of 32, 32, 16 and 16 columns the largest; the expert is 96 wide
    with pytest.raises(ConfigError, match="2 experts of 73728 bytes do not fit"):
        RayEngine(path, num_expert_hosts=3, num_replicas=1, host_capacity_bytes=capacity - 1, options=OPTIONS)
    requests, collector = some_requests("small"), Collector()
    engine = RayEngine(
        path, num_expert_hosts=3, num_replicas=1, expert_slices=4, host_capacity_bytes=capacity, options=OPTIONS
    )
    try:
        engine.start(collector.collect)
        assert collector.run(engine, requests) == reference(path, requests, expert_slices=4)
        held = [len(worker.experts) for worker in engine.status() if worker.role is Role.EXPERT]
        assert sorted(held) == [2, 3, 3]
        assert all(load.bytes_held <= capacity for load in engine.control.loads())
    finally:
        engine.close()


def test_a_cut_that_does_not_fit_is_refused_before_anything_starts(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="expert_slices=97 does not fit experts 96 wide"):
        RayEngine(model_dir, num_expert_hosts=1, expert_slices=97, options=OPTIONS)
