import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.checkpoint.config_file import read_config
from llama4_dist.engine import kv_sizing
from llama4_dist.engine.build import build_single_process, resolve_dtype
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError, UnavailableError
from llama4_dist.model.kv_layout import page_bytes
from llama4_dist.request import EngineRequest
from tests.checkpoints import make_checkpoint
from tests.engine.collector import Collector
from tests.engine.fake_model import tokens
from tests.engine.sequences import request
from tests.native.compiler import needs_compiler


def generate(engine: LocalEngine, prompt: tuple[int, ...], **fields: Any) -> list[int]:
    collector = Collector()
    engine.start(collector)
    engine.submit(request("a", prompt, **fields))
    outputs = collector.wait_for("a")
    assert outputs[-1].error is None
    engine.close()
    return tokens(outputs)


@pytest.mark.parametrize("preset", ["behemoth", "dense", "topk2", "v5", "conditional"])
def test_every_member_of_the_family_runs(tmp_path: Path, preset: str) -> None:
    path = make_checkpoint(tmp_path, preset)
    options = EngineOptions(num_blocks=40)
    one = generate(build_single_process(path, options=options), tuple(range(40)), max_tokens=5, ignore_eos=True)
    three = build_single_process(path, options=options, num_inproc_hosts=3)
    assert generate(three, tuple(range(40)), max_tokens=5, ignore_eos=True) == one
    assert len(one) == 5


def test_a_checkpoint_in_bfloat16_runs_in_it_and_loading_reports_progress(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "scout", dtype=torch.bfloat16)
    seen: list[tuple[int, int]] = []
    engine = build_single_process(
        path, options=EngineOptions(num_blocks=20), progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (4, 4)
    assert len(generate(engine, (1, 2, 3), max_tokens=5, ignore_eos=True)) == 5


def test_the_name_and_the_limits_come_from_folder_config_and_options(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "tiny-scout", "scout")
    limits = build_single_process(path, options=EngineOptions(num_blocks=20)).limits
    assert (limits.model, limits.vocab_size, limits.max_context) == ("tiny-scout", 320, (20 - 3) * 16)
    named = build_single_process(path, options=EngineOptions(max_context=100, model_name="mine", max_waiting=7)).limits
    assert (named.model, named.max_context, named.max_waiting) == ("mine", 100, 7)
    assert build_single_process(path).limits.max_context == 1024


def test_blocks_follow_the_memory_and_never_exceed_what_can_be_used(tmp_path: Path) -> None:
    config = read_config(make_checkpoint(tmp_path, "scout"))
    # keys and values x 1 layer x 2 heads x 16 wide x 16 positions x 4 bytes
    size = page_bytes(config, block_size=16, dtype_bytes=4)
    assert size == 2 * 1 * 2 * 16 * 16 * 4

    def blocks(memory_bytes: int = 10**12, **fields: Any) -> int:
        return kv_sizing.num_pages(config, EngineOptions(**fields), dtype_bytes=4, memory_bytes=memory_bytes)

    assert blocks(num_blocks=7) == 7
    assert blocks(kv_cache_bytes=10 * size + 1) == 10
    assert blocks(memory_bytes=1000 * size) == 100
    # One group keeps everything, three keep a chunk of 16.
    assert blocks(max_num_seqs=3) == 3 * (64 + 3)
    assert blocks(max_num_seqs=3, max_context=17) == 3 * (2 + 3)
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        blocks(kv_cache_bytes=4 * size - 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_num_seqs": 0},
        {"block_size": -1},
        {"num_blocks": 0},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
        {"expert_timeout_s": -1},
    ],
)
def test_options_that_cannot_work_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EngineOptions(**fields)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_the_cache_may_have_a_dtype_of_its_own_and_batching_changes_no_token(tmp_path: Path, kv_dtype: str) -> None:
    path = make_checkpoint(tmp_path, "scout", dtype=torch.bfloat16)
    cuts: list[dict[str, Any]] = [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 1}]
    said = [
        generate(
            build_single_process(path, options=EngineOptions(num_blocks=40, kv_dtype=kv_dtype, **fields)),
            tuple(range(40)),
            max_tokens=20,
            ignore_eos=True,
        )
        for fields in cuts
    ]
    assert said[0] == said[1]
    engine = build_single_process(path, dtype="float32", options=EngineOptions(num_blocks=40, kv_dtype=kv_dtype))
    width = 2 * 2 * 16 * getattr(torch, kv_dtype).itemsize
    assert engine.core.runner._cache.num_bytes == 40 * 16 * width


def test_a_kv_dtype_that_is_unknown_or_that_the_device_lacks_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "scout")
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more, cpu is none: take bfloat16"):
        build_single_process(path, options=EngineOptions(kv_dtype="float8_e4m3"))
    with pytest.raises(ConfigError, match="kv_dtype='int4' is none of auto, float32, bfloat16, float8_e4m3"):
        build_single_process(path, options=EngineOptions(kv_dtype="int4"))


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_tokens_are_the_same_on_any_hosts_alone_and_in_a_batch(tmp_path: Path, dtype: str) -> None:
    path = make_checkpoint(tmp_path, "scout")
    requests = [request(f"r{index}", tuple(range(7 + 9 * index)), max_tokens=12, ignore_eos=True) for index in range(4)]

    def say(weights: str, batches: Sequence[Sequence[EngineRequest]], num_hosts: int = 1) -> list[list[int]]:
        engine = build_single_process(
            path, dtype=dtype, weights=weights, num_inproc_hosts=num_hosts, options=EngineOptions(num_blocks=60)
        )
        collector, said = Collector(), []
        engine.start(collector)
        for batch in batches:
            for one in batch:
                engine.submit(one)
            said += [tokens(collector.wait_for(one.request_id)) for one in batch]
        engine.close()
        return said

    alone = say("int8", [[one] for one in requests])
    assert all(len(one) == 12 for one in alone)
    assert say("int8", [requests]) == alone
    assert say("int8", [requests], num_hosts=2) == alone
    assert say("stored", [requests]) != alone, "the format is not heeded"


def test_weights_that_cannot_be_computed_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "scout")
    with pytest.raises(ConfigError, match="weights='int4' is none of stored, int8"):
        build_single_process(path, weights="int4")
    with pytest.raises(ConfigError, match="weights='int8' is for processors, the device is cuda: take"):
        build_single_process(path, weights="int8", device="cuda")


def test_an_unknown_dtype_and_no_host_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8"):
        resolve_dtype("int8", "float32")
    with pytest.raises(ConfigError, match="num_inproc_hosts"):
        build_single_process(make_checkpoint(tmp_path, "scout"), num_inproc_hosts=0)


def test_losing_every_expert_is_a_retriable_error_and_the_engine_lives(tmp_path: Path) -> None:
    options = EngineOptions(num_blocks=60, expert_timeout_s=0.1)
    engine = build_single_process(make_checkpoint(tmp_path, "scout"), options=options)
    collector = Collector()
    engine.start(collector)
    engine.submit(request("a", (1, 2, 3), max_tokens=900, ignore_eos=True))
    collector.wait(lambda: "a" in collector.outputs)
    dispatcher = engine.core.runner.dispatcher
    engine.between_steps(lambda: dispatcher.switch(dispatcher.table, {}))  # a host without a link counts as lost
    error = collector.wait_for("a")[-1].error
    assert isinstance(error, UnavailableError)
    assert error.reason == "EXPERT_UNREACHABLE"
    with pytest.raises(UnavailableError):
        engine.score((1, 2, 3))
    engine.submit(request("b", (1, 2, 3)))
    assert isinstance(collector.wait_for("b")[-1].error, UnavailableError)
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert (stats.requests_admitted, stats.requests_failed) == (2, 2)
    engine.close()


def test_a_single_process_imports_neither_ray_nor_grpc() -> None:
    code = "import sys, llama4_dist.engine.build; print([m for m in ('ray', 'grpc') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert output.stdout.strip() == "[]"
