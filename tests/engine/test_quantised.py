"""Quantised models say what transformers says, cut into slices and within less memory than their experts take."""

from pathlib import Path

import pytest
import torch

from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from llama4_dist.partition import Partition
from tests.engine.collector import Collector
from tests.engine.fake_model import tokens
from tests.engine.sequences import request
from tests.engine.test_slices import scores
from tests.model.references import load_reference
from tests.native.compiler import needs_compiler
from tests.quantised_checkpoints import make_quantised

PROMPT = tuple((7 * i + 3) % 256 for i in range(40))
NUM_TOKENS = 24


def said(path: Path, **options: object) -> list[int]:
    engine = build_single_process(path, options=EngineOptions(num_blocks=80), num_threads=1, **options)  # type: ignore[arg-type]
    collector = Collector()
    try:
        engine.start(collector)
        engine.submit(request("a", PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True))
        return list(tokens(collector.wait_for("a")))
    finally:
        engine.close()


@pytest.mark.parametrize("form", ["int8", "int4", "int4-channel"])
def test_tokens_are_those_of_transformers_however_experts_lie(form: str, tmp_path: Path) -> None:
    """Sixteen experts of 72 KB in float32: at 100 KB one of them, expanded, is in memory at a time."""
    path = make_quantised(tmp_path, form)
    generated = load_reference(path, "text").generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long), do_sample=False,
        temperature=None, top_p=None, max_new_tokens=NUM_TOKENS, eos_token_id=-1,
    )  # fmt: skip
    expected = generated[0, len(PROMPT) :].tolist()
    assert said(path) == expected
    for num_slices in (1, 3):
        assert said(path, expert_slices=num_slices, num_inproc_hosts=2, expert_memory_bytes=200_000) == expected
    partition = Partition(num_stages=2, num_ranks=2)
    assert said(path, partition=partition, expert_slices=3, expert_memory_bytes=400_000) == expected


@needs_compiler
@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cut_has_one_result_on_any_hosts(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_quantised(tmp_path, form, dtype=dtype)
    cut = scores(path, expert_slices=3)
    assert not torch.equal(scores(path), cut), "nothing was cut"
    for num_hosts in (2, 3):
        assert torch.equal(scores(path, expert_slices=3, num_inproc_hosts=num_hosts), cut)
    assert torch.equal(scores(path, expert_slices=3, expert_memory_bytes=80_000), cut)


def test_slices_that_cut_groups_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expert_slices=6 cuts groups .*: take one of 1, 3$"):
        build_single_process(make_quantised(tmp_path, "int4"), expert_slices=6)
