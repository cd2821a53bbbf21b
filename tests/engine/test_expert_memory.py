"""A model whose experts are larger than the memory they may take says what transformers says, within the bound."""

from pathlib import Path

import pytest
import torch

from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from llama4_dist.model.expert_store import KERNEL_MAPS
from tests.checkpoints import make_checkpoint
from tests.engine.collector import Collector
from tests.engine.fake_model import tokens
from tests.engine.sequences import request
from tests.model.references import load_reference
from tests.model.test_expert_store import resident_bytes
from tests.native.compiler import needs_compiler

MIB = 1024 * 1024
LIMIT = 16 * MIB
PROMPT = tuple((7 * i + 3) % 256 for i in range(40))


@needs_compiler
@pytest.mark.parametrize("expert_slices", [1, 2])
def test_tokens_are_those_of_transformers_and_memory_stays_bounded(tmp_path: Path, expert_slices: int) -> None:
    """Eight experts of 12 MiB; a prompt asks for most of them in one step."""
    path = make_checkpoint(
        tmp_path, "scout", hidden_size=512, intermediate_size=2048, num_local_experts=8, num_hidden_layers=2,
        interleave_moe_layer_step=2, no_rope_layers=[1, 0],
    )  # fmt: skip
    generated = load_reference(path, "text").generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long), do_sample=False,
        temperature=None, top_p=None, max_new_tokens=24, eos_token_id=-1,
    )  # fmt: skip
    engine = build_single_process(
        path,
        options=EngineOptions(num_blocks=40),
        num_threads=1,
        expert_slices=expert_slices,
        expert_memory_bytes=LIMIT,
    )
    loaded, seen, collector = resident_bytes(path), [], Collector()

    def listen(outputs: object) -> None:
        seen.append(resident_bytes(path) - loaded)
        collector(outputs)  # type: ignore[arg-type]

    try:
        engine.start(listen)
        engine.submit(request("a", PROMPT, max_tokens=24, ignore_eos=True))
        said = tokens(collector.wait_for("a"))
    finally:
        engine.close()
    assert said == generated[0, len(PROMPT) :].tolist()
    assert len(seen) == 24
    assert max(seen) < LIMIT + 3 * 4 * KERNEL_MAPS, "of 96 MiB; beside each matrix the kernel maps some neighbours"


def test_a_bound_for_what_is_copied_anyway_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "scout", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"as they are stored \(bfloat16\), not in torch.float32"):
        build_single_process(path, dtype="float32", expert_memory_bytes=MIB)
