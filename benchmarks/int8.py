"""Say what int8 weights cost and what they give, against the same checkpoint's weights as stored.

Error: the engine with stored weights writes texts of its own, and both engines score them: logits, greedy next tokens,
and the Kullback-Leibler divergence KL(stored || int8), in nats. Speed: a process of each decodes, in turns; a
ratio is taken in each round, and their median counts. Random routers choose by small margins, so the default checkpoint
shows a large error: other experts compute. `--model` takes a trained one.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.checkpoint import commit, write_checkpoint
from benchmarks.contenders.process import Contender
from benchmarks.quiet import undisturbed
from benchmarks.workloads import Speed, decode
from llama4_dist import LLM, Sampling

STORED, INT8 = "stored", "int8"
KV_CACHE_BYTES = 256 << 20


def scored_texts(model_dir: Path, arguments: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """Let the stored model write texts; return the logits [T, V] of each, by stored weights and by int8."""
    options = {"dtype": arguments.dtype, "num_threads": arguments.threads, "kv_cache_bytes": KV_CACHE_BYTES}
    sampling = [
        Sampling(temperature=1.0, seed=seed, max_tokens=arguments.text - 1, ignore_eos=True)
        for seed in range(arguments.texts)
    ]
    with LLM(model_dir, weights=STORED, **options) as llm:
        starts = [[1 + 97 * seed % (llm.config.vocab_size - 1)] for seed in range(arguments.texts)]
        written = llm.generate(starts, sampling)
        texts = [start + list(one.token_ids) for start, one in zip(starts, written, strict=True)]
        stored = [llm.score(text) for text in texts]
    with LLM(model_dir, weights=INT8, **options) as llm:
        return stored, [llm.score(text) for text in texts]


def differences(stored_PV: Tensor, int8_PV: Tensor) -> dict[str, float]:
    """Compare the logits of some positions."""
    moved_PV = (int8_PV - stored_PV).abs()
    stored_log_PV, int8_log_PV = stored_PV.double().log_softmax(-1), int8_PV.double().log_softmax(-1)
    return {
        "positions": len(stored_PV),
        "max_logit_difference": float(moved_PV.max()),
        "mean_logit_difference": float(moved_PV.mean()),
        "logit_deviation": float(stored_PV.std()),
        "equal_greedy_tokens": float((stored_PV.argmax(-1) == int8_PV.argmax(-1)).double().mean()),
        "mean_kl_divergence": float((stored_log_PV.exp() * (stored_log_PV - int8_log_PV)).sum(-1).mean()),
    }


def speeds(
    model_dir: Path, vocab_size: int, arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, dict[int, list[float]]], dict[str, int], float]:
    """Return tokens per second by format and batch, the memory of each process, and the largest share of others."""
    rates: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in (STORED, INT8)}
    largest_share = 0.0
    with ExitStack() as resources:
        contenders = []
        for name in rates:
            settings = [str(model_dir), str(arguments.threads), str(max(arguments.batches)), name]
            contender = Contender(name, "engine", settings, log=folder / f"{name}.log", threads=arguments.threads)
            resources.callback(contender.close)
            contenders.append(contender)
        for index in range(arguments.rounds + 1):
            for batch in arguments.batches:
                prompts = decode(batch, arguments.tokens).prompts(index, vocab_size)
                for contender in contenders:
                    timed, share = undisturbed(partial(contender.ask, prompts, arguments.tokens), (contender.pid,))
                    if index:  # the first round warms up
                        rates[contender.name][batch].append(timed.rate)
                        largest_share = max(largest_share, share)
        memory = {contender.name: psutil.Process(contender.pid).memory_info().rss for contender in contenders}
    return rates, memory, largest_share


def ratios(stored: Sequence[float], int8: Sequence[float]) -> Speed:
    """Return int8's speed over that of stored weights in each round: what disturbs a round falls on both."""
    return Speed(rounds=tuple(fast / slow for slow, fast in zip(stored, int8, strict=True)))


def report(error: dict[str, float], found: dict[str, Speed], memory: dict[str, int], title: str) -> None:
    table = Table("what", "figure", title=title)
    table.columns[1].justify = "right"
    table.add_row("positions", f"{error['positions']:.0f}")
    table.add_row(
        "|logit difference|, max / mean", f"{error['max_logit_difference']:.3f} / {error['mean_logit_difference']:.4f}"
    )
    table.add_row("standard deviation of the stored logits", f"{error['logit_deviation']:.3f}")
    table.add_row("equal greedy next tokens", f"{error['equal_greedy_tokens']:.1%}")
    table.add_row("mean KL(stored || int8), nats", f"{error['mean_kl_divergence']:.5f}")
    table.add_section()
    for name, ratio in found.items():
        extremes = f"{min(ratio.rounds):.2f}–{max(ratio.rounds):.2f}"
        table.add_row(f"{name}: int8 tokens/s over stored", f"{ratio.median:.2f} ({extremes})")
    table.add_row("memory, MB: stored / int8", " / ".join(f"{memory[name] / 1e6:.0f}" for name in (STORED, INT8)))
    Console(width=120).print(table)


def main(given: Sequence[str] | None = None) -> None:
    # A stopped child would outlive us: whoever ends this run ends it too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the new checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--text", type=int, default=128, help="tokens of each text that is scored")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="of each sequence of a decode")
    parser.add_argument("--model", type=Path, help="a checkpoint; by default a new one of the comparisons' geometry")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="llama4-int8-") as name:
        folder = Path(name)
        model_dir = arguments.model or write_checkpoint(folder / "model", arguments.dtype)
        stored, int8 = scored_texts(model_dir, arguments)
        error = differences(torch.cat(stored), torch.cat(int8))
        rates, memory, others = speeds(model_dir, stored[0].shape[1], arguments, folder)
    found = {f"decode {batch}": ratios(rates[STORED][batch], rates[INT8][batch]) for batch in arguments.batches}
    title = f"{model_dir.name}, {arguments.threads} threads, {arguments.rounds} rounds, commit {commit()}"
    report(error, found, memory, f"{title}, other processes had {others:.0%} at most")
    if arguments.json:
        head = {"benchmark": "int8", "at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
        medians = {name: ratio.median for name, ratio in found.items()}
        figures = {"error": error, "ratios": medians, "rounds": rates, "memory_bytes": memory, "others": others}
        written = head | {"settings": vars(arguments)} | figures
        arguments.json.write_text(json.dumps(written, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
