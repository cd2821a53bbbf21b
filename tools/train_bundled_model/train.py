"""Trains models/llama4-mini from nothing on one CPU thread and exports it as it goes.

Run `python -m tools.train_bundled_model.train --corpus /tmp/corpus --out models/llama4-mini`; the schedule ends
at --steps or after --minutes, whichever comes first.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_bundled_model import corpus, export, samples, tokenizer
from tools.train_bundled_model.model import FeedForward, Geometry, MiniLlama4
from tools.train_bundled_model.optimizer import optimizers

LENGTH = 512  # of the held-out rows
PASS_LENGTHS = (512, 1024)  # row length, pass by pass in turn: short rows are cheap, long ones teach far positions
TOKENS_PER_STEP = 8192
BALANCE = 0.01  # weight of the load-balancing loss, summed over layers
WARMUP = 0.01  # share of the schedule
HEAD_ROWS = 1024  # logits are made this many rows at a time, to stay in cache
HELD_OUT_EVERY = 50  # documents per source


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    corpus.fetch(args.corpus)
    kept, held = split(corpus.read(args.corpus))
    tokens = tokenizer.train(s for d in kept for paragraph in d.paragraphs for s in paragraph)
    pad_id = tokenizer.special_id(tokens, "<|finetune_right_pad|>")
    held_rows = samples.held_out(held, tokens, LENGTH).long()
    model = MiniLlama4(Geometry())
    steppers = optimizers(model)
    start = last_export = time.monotonic()
    report(f"documents={len(kept)}+{len(held)} held_rows={len(held_rows)} parameters={num_parameters(model)}")
    smooth, seen = 0.0, 0
    for step, ids_BT in enumerate(batches(kept, tokens, args.seed)):
        minutes = (time.monotonic() - start) / 60
        done = max(step / args.steps, minutes / args.minutes)
        if done >= 1:
            break
        loss = train_step(model, steppers, ids_BT.long(), pad_id, rate_at(done))
        seen += ids_BT[:, 1:].numel()
        smooth = loss if step == 0 else smooth + max(0.02, 1 / (step + 1)) * (loss - smooth)
        if step % 20 == 0:
            shares = [min(f.num_rows) / seen_rows(f) for f in model.feed_forwards]
            eta = minutes / done * (1 - done) if done else math.nan
            report(
                f"step={step} loss={smooth:.3f} tokens={seen / 1e6:.2f}M rate={seen / max(minutes, 1e-9) / 60:.0f}/s"
                f" minutes={minutes:.1f} eta={eta:.0f} least_share={min(shares):.3f}"
            )
        if time.monotonic() - last_export > 60 * args.export_minutes:
            export.write(model, tokens, args.out)
            report(f"exported step={step} held_out_perplexity={perplexity(model, held_rows[:48]):.2f}")
            last_export = time.monotonic()
    export.write(model, tokens, args.out)
    report(f"finished steps={step} tokens={seen} perplexity={perplexity(model, held_rows):.3f} loss={smooth:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder the packages are unpacked in")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--export-minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=4)
    return parser.parse_args()


def split(documents: list[corpus.Document]) -> tuple[list[corpus.Document], list[corpus.Document]]:
    """Hold out every HELD_OUT_EVERYth document of each source."""
    kept: list[corpus.Document] = []
    held: list[corpus.Document] = []
    counts: dict[str, int] = {}
    for d in documents:
        counts[d.source] = counts.get(d.source, -1) + 1
        (held if counts[d.source] % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 else kept).append(d)
    return kept, held


def batches(documents: list[corpus.Document], tokens: Tokenizer, seed: int) -> Iterator[Tensor]:
    """Yield [rows, length + 1] ids of TOKENS_PER_STEP predictions for ever, pass after pass."""
    for number in itertools.count():
        length = PASS_LENGTHS[number % len(PASS_LENGTHS)]
        rows = samples.epoch(documents, tokens, length, seed=seed * 1000 + number)
        report(f"pass={number} length={length} rows={len(rows)}")
        size = TOKENS_PER_STEP // length
        yield from (rows[i : i + size] for i in range(0, len(rows) - size + 1, size))


def train_step(
    model: MiniLlama4, steppers: list[torch.optim.Optimizer], ids_BT: Tensor, pad_id: int, rate: float
) -> float:
    """Take one optimiser step; return the mean loss of the predicted tokens."""
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = group["base_lr"] * rate
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_BTD = model(ids_BT[:, :-1], torch.bfloat16)
        x_TD = x_BTD.detach().flatten(0, 1).requires_grad_()
        targets_T = samples.targets_of(ids_BT[:, 1:].flatten(), pad_id)
        count, total = int((targets_T != samples.IGNORED).sum()), 0.0
        for rows, targets in zip(x_TD.split(HEAD_ROWS), targets_T.split(HEAD_ROWS), strict=True):
            part = F.cross_entropy(model.lm_head(rows).float(), targets, reduction="sum") / count
            part.backward()
            total += part.item()
    balance = BALANCE * torch.stack([f.balance for f in model.feed_forwards]).sum()
    torch.autograd.backward([x_BTD, balance], [x_TD.grad.view_as(x_BTD), torch.ones(())])
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad()
    return total


def rate_at(done: float) -> float:
    """Return the learning rate's factor: short warm-up, then a cosine to 2 %."""
    return min(1.0, done / WARMUP + 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def perplexity(model: MiniLlama4, rows: Tensor) -> float:
    """Return exp of the mean loss over rows [rows, length + 1], in float32."""
    losses = [
        F.cross_entropy(model.lm_head(model(part[:, :-1])).flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for part in rows.split(4)
    ]
    return math.exp(sum(losses) / rows[:, 1:].numel())


def num_parameters(model: MiniLlama4) -> int:
    return sum(p.numel() for p in model.parameters())


def seen_rows(feed_forward: FeedForward) -> int:
    return max(1, sum(feed_forward.num_rows))


def report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
