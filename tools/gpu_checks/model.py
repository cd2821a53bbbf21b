"""Checks the model: against the arithmetic of `llama4_dist.model`, and a token's bits in every company."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from gpu_checks.harness import Session, relative_error
from gpu_checks.stack import BLOCK_SIZE, make_batch, make_cache, random_model, small_config, tiny_config
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.gpu.model import GpuLlama4

PRESETS = {"scout": (torch.float32, torch.bfloat16), "topk2": (torch.bfloat16,)}


def check_model(session: Session) -> None:
    """Logits of tiny checkpoints, prompt and decode, against the CPU's float32."""
    from tests.checkpoints import make_checkpoint
    from tests.model.direct import Runner

    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    sizes = [30, 1] if session.is_cuda else [12, 1]
    tokens = tokens if session.is_cuda else tokens[:14]
    for preset, dtypes in PRESETS.items() if session.is_cuda else [("scout", (torch.float32,))]:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Checkpoint.open(make_checkpoint(Path(folder), preset))
            expected_TV = Runner.load(checkpoint).in_chunks(tokens, sizes)
            torch_TV = Runner.load(checkpoint, dtype=torch.bfloat16).in_chunks(tokens, sizes)
            for dtype in dtypes:
                model = GpuLlama4.load(checkpoint, dtype=dtype, device=session.device)
                logits_TV = _in_chunks(model, tokens, sizes, dtype)
                # Rounding sends some tokens of so small a model to another expert, in torch on the CPU as here: whole
                # rows differ then. So bfloat16 is judged by the median row, beside what torch's own rounding does; that
                # moved by a fifth when only the CPU's decoder changed, so twice as far is still the same noise.
                error, of_torch = _median_error(logits_TV.cpu(), expected_TV), _median_error(torch_TV, expected_TV)
                limit = 1e-4 if dtype == torch.float32 else 2 * of_torch
                note = "" if dtype == torch.float32 else f"median row; torch's bfloat16 on the CPU: {of_torch:.2e}"
                session.add(f"logits of {preset}, {str(dtype)[6:]}", error < limit, error=error, note=note)
            checkpoint.close()


def _median_error(out_TV: Tensor, expected_TV: Tensor) -> float:
    difference_T = (out_TV.double() - expected_TV.double()).norm(dim=1)
    return float((difference_T / expected_TV.double().norm(dim=1)).median())


def check_model_bits(session: Session) -> None:
    """The logits of one sequence: prefilled whole, in chunks, decoded, alone and with others, by graph and without."""
    config = small_config() if session.is_cuda else tiny_config()
    length, tail = (700, 24) if session.is_cuda else (20, 3)
    dtype = torch.bfloat16 if session.is_cuda else torch.float32
    model = random_model(config, session.device, dtype)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
    whole_TV = _in_chunks(model, tokens, [length], dtype)
    session.add("logits are finite", bool(whole_TV.isfinite().all()))
    if not session.is_cuda:  # numpy chooses its products by their shape, so the interpreter says nothing of bits
        error = relative_error(_in_chunks(model, tokens, [7, 4, 1], dtype), whole_TV)
        session.add("prompt in parts, then decode", error < 1e-5, error=error)
        error = relative_error(_with_others(model, tokens, tail, 2, dtype), whole_TV[-tail:])
        session.add("decode with 2 other sequences", error < 1e-5, error=error)
        return
    ways = [[100], [64, 1, 33, 200]]
    for sizes in ways:
        same = torch.equal(_in_chunks(model, tokens, sizes, dtype), whole_TV)
        session.add(f"same bits, prompt in parts of {sizes}", same)
    decoded_TV = _in_chunks(model, tokens, [length - tail, 1], dtype)
    note = f"largest difference {float((decoded_TV - whole_TV).abs().max()):.1e}"
    session.add("same bits, decode and prefill", torch.equal(decoded_TV, whole_TV), note=note)
    for num_others in (1, 5, 40):
        company_TV = _with_others(model, tokens, tail, num_others, dtype)
        same = torch.equal(company_TV, decoded_TV[-tail:])
        session.add(f"same bits, decode with {num_others} other sequences", same)
    eager = GpuLlama4(config, model.weights, use_graphs=False)
    same = torch.equal(_in_chunks(eager, tokens, [length - tail, 1], dtype), decoded_TV)
    session.add("same bits, graph and single launches", same)


def _in_chunks(model: GpuLlama4, tokens: list[int], sizes: list[int], dtype: torch.dtype) -> Tensor:
    """Run one sequence in steps of the given sizes, the last size again and again; return all logits."""
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    cache = make_cache(model.config, num_blocks * BLOCK_SIZE, model.device, dtype)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(len(sizes))).tolist()
    logits, start, sizes = [], 0, list(sizes)
    while start < len(tokens):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        logits.append(model.forward(make_batch(model, [(tokens[start : start + size], start, blocks)]), cache))
        start += size
    return torch.cat(logits)


def _with_others(model: GpuLlama4, tokens: list[int], tail: int, num_others: int, dtype: torch.dtype) -> Tensor:
    """Decode the last `tail` tokens in steps with others, of which each stands at another length."""
    per_sequence = -(-len(tokens) // BLOCK_SIZE)
    cache = make_cache(model.config, (num_others + 1) * per_sequence * BLOCK_SIZE, model.device, dtype)
    ids = [list(range(i, (num_others + 1) * per_sequence, num_others + 1)) for i in range(num_others + 1)]
    generator = torch.Generator().manual_seed(11)
    others = torch.randint(0, model.config.vocab_size, (num_others, len(tokens)), generator=generator).tolist()
    lengths = [1 + 7 * index % (len(tokens) - tail) for index in range(num_others)]
    head = len(tokens) - tail
    for index, length in enumerate(lengths):
        model.forward(make_batch(model, [(others[index][:length], 0, ids[index + 1])]), cache)
    model.forward(make_batch(model, [(tokens[:head], 0, ids[0])]), cache)
    logits = []
    for step in range(tail):
        mine = ([tokens[head + step]], head + step, ids[0])
        parts = [([others[i][lengths[i] + step]], lengths[i] + step, ids[i + 1]) for i in range(num_others)]
        row = step % (num_others + 1)  # the sequence stands in another row each time
        parts.insert(row, mine)
        logits.append(model.forward(make_batch(model, parts), cache)[row : row + 1])
    return torch.cat(logits)
