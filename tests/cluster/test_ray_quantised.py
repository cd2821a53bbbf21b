"""Quantised checkpoints over real Ray actors: experts in two slices on two hosts each say what one process says."""

from pathlib import Path

import pytest

from cluster.ray_engine import RayEngine, read_geometry
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from llama4_dist.llm import LLM
from llama4_dist.partition import Partition
from llama4_dist.request import Sampling
from tests.cluster.running import Collector, reference, some_requests
from tests.native.compiler import needs_compiler
from tests.quantised_checkpoints import make_quantised

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

OPTIONS = EngineOptions(num_blocks=128, max_num_seqs=8)
WIDTH, EXPERTS = 128, 16


@needs_compiler
@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_two_slices_on_two_hosts_each_say_what_one_process_says(form: str, tmp_path: Path) -> None:
    """A bound on memory too: each host keeps a few of its 32 slices of each layer."""
    model_dir = make_quantised(tmp_path, form, intermediate_size=WIDTH)
    requests, collector = some_requests("q", max_tokens=24), Collector()
    expected = reference(model_dir, requests, expert_slices=2)
    engine = RayEngine(
        model_dir, num_expert_hosts=2, num_replicas=2, expert_slices=2, expert_memory_bytes=300_000, options=OPTIONS
    )
    try:
        engine.start(collector.collect)
        assert collector.run(engine, requests) == expected
        pairs = {(layer, unit) for layer in range(4) for unit in range(2 * EXPERTS)}
        hosts = [worker for worker in engine.status() if worker.worker.startswith("expert")]
        assert [set(host.experts) for host in hosts] == [pairs, pairs]
    finally:
        engine.close()


@needs_compiler
def test_the_python_class_takes_a_quantised_folder(tmp_path: Path) -> None:
    model_dir = make_quantised(tmp_path, "int8")
    prompts, sampling = [[1, 7, 9, 4], [3] * 20], Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(model_dir, expert_slices=2) as llm:
        expected = [completion.outputs[0].token_ids for completion in llm.generate(prompts, sampling)]
    with LLM(model_dir, num_expert_hosts=2, expert_slices=2) as llm:
        assert [completion.outputs[0].token_ids for completion in llm.generate(prompts, sampling)] == expected


def test_placement_counts_what_is_stored_and_refuses_a_cut_group_before_ray_is_asked(tmp_path: Path) -> None:
    model_dir = make_quantised(tmp_path, "int4", intermediate_size=WIDTH)
    (stored,) = Checkpoint.open(model_dir).expert_formats
    geometry = read_geometry(model_dir, "auto", expert_slices=2)
    assert geometry.expert_bytes == stored.slice_bytes(64, WIDTH) == 2 * geometry.slice_bytes
    with pytest.raises(ConfigError, match=r"expert_slices=8 cuts groups .*: take one of 1, 2, 4$"):
        RayEngine(model_dir, num_expert_hosts=2, expert_slices=8)
    linears = make_quantised(tmp_path / "linears", "int4", linears=True)
    with pytest.raises(ConfigError, match=r"num_ranks=4 cuts groups .*: take one of 1, 2$"):
        RayEngine(linears, num_expert_hosts=2, partition=Partition(num_ranks=4))
