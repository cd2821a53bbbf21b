"""Checks the whole engine in one process on the device: scheduler, pages, prefix cache, sampler, model."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpu_checks.harness import Session

if TYPE_CHECKING:
    from llama4_dist.engine.local import LocalEngine

NUM_TOKENS = 24  # of each request
VOCABULARY = 256


def check_engine(session: Session) -> None:
    """Greedy tokens: in float32 those of the processor's engine, in bfloat16 the same alone and in any company."""
    if not session.is_cuda:
        session.add("engine", "skipped", note="without a card tests/gpu/test_engine.py runs it in the interpreter")
        return
    try:
        import msgpack  # noqa: F401
        import psutil  # noqa: F401
        import xxhash  # noqa: F401
    except ImportError as error:
        session.add("engine", "skipped", note=f"it needs more than the kernels do: {error}")
        return
    from tests.checkpoints import make_checkpoint

    generator = torch.Generator().manual_seed(17)
    lengths = [1, 3, 9, 40, 41, 17, 64, 5, 30, 22, 100, 2]
    prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    prompts[5] = prompts[3][:32] + prompts[5]  # they share their first pages
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder), "scout", num_hidden_layers=4)
        expected = _tokens(path, "cpu", "float32", prompts)
        found = _tokens(path, str(session.device), "float32", prompts)
        session.add("engine: tokens of the processor's, float32", found == expected, note=_agreement(found, expected))
        together = _tokens(path, str(session.device), "bfloat16", prompts)
        alone = [_tokens(path, str(session.device), "bfloat16", [prompt])[0] for prompt in prompts]
        note = _agreement(together, alone)
        session.add("engine: tokens in company are those alone, bfloat16", together == alone, note=note)
        few_pages = _tokens(path, str(session.device), "bfloat16", prompts, num_blocks=40)
        note = _agreement(few_pages, alone)
        session.add("engine: with memory for a few requests, bfloat16", few_pages == alone, note=note)


def _tokens(
    path: Path, device: str, dtype: str, prompts: Sequence[list[int]], *, num_blocks: int = 400
) -> list[list[int]]:
    """Return what an engine says after each prompt; they arrive one a step, so that prompts and decodes mix."""
    from llama4_dist.engine.build import build_single_process
    from llama4_dist.engine.options import EngineOptions

    options = EngineOptions(num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=32, max_context=160)
    engine = build_single_process(path, dtype=dtype, device=device, options=options)
    try:
        return _run(engine, prompts)
    finally:
        engine.close()


@torch.inference_mode()
def _run(engine: "LocalEngine", prompts: Sequence[list[int]]) -> list[list[int]]:
    from llama4_dist.request import EngineRequest, Sampling, TokenOutput

    said: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    waiting = [
        EngineRequest(
            request_id=str(index),
            prompt_token_ids=tuple(prompt),
            sampling=Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
        )
        for index, prompt in enumerate(prompts)
    ]
    while waiting or engine.core.has_work:
        if waiting:
            engine.core.add(waiting.pop(0), arrived_s=time.monotonic())
        for output in engine.core.step():
            assert isinstance(output, TokenOutput), output
            if output.error is not None:
                raise output.error
            said[output.request_id] += output.token_ids
    return list(said.values())


def _agreement(found: Sequence[list[int]], expected: Sequence[list[int]]) -> str:
    pairs = list(zip(found, expected, strict=True))
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)} requests equal"
