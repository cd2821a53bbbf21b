"""An engine over the model on one device says what the engine over hosts says."""

from pathlib import Path

import pytest
import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.engine.build import assemble, build_single_process
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.one_device import load_on_one_device
from llama4_dist.engine.options import EngineOptions
from llama4_dist.request import EngineRequest, Sampling, TokenOutput
from tests.checkpoints import make_checkpoint

PROMPTS = {"a": (3, 1, 4, 1, 5, 9, 2, 6), "b": (2, 7, 1)}
OPTIONS = EngineOptions(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=16, max_context=64)


@torch.inference_mode()
def tokens_of(engine: LocalEngine) -> dict[str, list[int]]:
    """Return three greedy tokens for each prompt, computed together."""
    said: dict[str, list[int]] = {name: [] for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        sampling = Sampling(temperature=0.0, max_tokens=3, ignore_eos=True)
        engine.core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling), arrived_s=0.0)
    while engine.core.has_work:
        for output in engine.core.step():
            assert isinstance(output, TokenOutput)
            assert output.error is None
            said[output.request_id] += output.token_ids
    return said


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "scout", num_hidden_layers=4)


def test_tokens_are_those_of_the_engine_over_hosts(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    model, dispatcher = load_on_one_device(checkpoint, dtype=torch.float32, device="cpu")
    engine = assemble(checkpoint, model, dispatcher, options=OPTIONS, dtype=torch.float32)
    expected = tokens_of(build_single_process(path, dtype="float32", options=OPTIONS))
    assert tokens_of(engine) == expected
    assert {len(tokens) for tokens in expected.values()} == {3}


@pytest.mark.gpu
def test_a_cuda_device_gets_the_model_that_needs_no_hosts(path: Path) -> None:
    engine = build_single_process(path, dtype="bfloat16", device="cuda", options=OPTIONS)
    assert type(engine.core.runner.model).__name__ == "GpuLlama4"
    assert {len(tokens) for tokens in tokens_of(engine).values()} == {3}
