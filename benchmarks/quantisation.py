"""Say what each quantised format costs in logits, for every geometry of the family and for a trained model.

A checkpoint is written, quantised by `llama4_dist.checkpoint.quantising`, and both are scored over the same texts, in
float32: KL(stored || quantised) in nats, equal greedy tokens, differences of logits. The family's checkpoints are
random and narrow, in the presets' proportions, and Behemoth's geometry is the project's own. Their routers choose by
small margins, so that other experts compute and errors are large. The bundled model is small, but trained.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.checkpoint import ROOT, commit
from benchmarks.int8 import KV_CACHE_BYTES, differences
from llama4_dist import LLM, Sampling
from llama4_dist.checkpoint.presets import PRESETS, SYNTHETIC, preset_config
from llama4_dist.checkpoint.quantising.run import quantise_checkpoint
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.scheme import Number, Scheme
from tests.checkpoints import make_checkpoint

BUNDLED = ROOT / "models" / "llama4-mini"
WIDTH, HEAD_DIM, MAX_HEADS, UNIT, VOCAB = 384, 32, 16, 128, 2048
FORMATS = ("fp8", "int8", "int4")
GROUPS = (128, 64, 32)  # of int4: the largest that divides both widths


def narrow(name: str, num_layers: int) -> dict[str, Any]:
    """Return a preset's config with small widths in the same proportions, whole multiples of UNIT."""
    config = preset_config(name)
    scale = WIDTH / config["hidden_size"]
    queries_per_key = config["num_attention_heads"] // config["num_key_value_heads"]
    num_kv_heads = MAX_HEADS // queries_per_key
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_kv_heads * queries_per_key,
        "num_key_value_heads": num_kv_heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": round(config["intermediate_size"] * scale / UNIT) * UNIT,
        "intermediate_size_mlp": round(config["intermediate_size_mlp"] * scale / UNIT) * UNIT,
        "num_local_experts": config["num_local_experts"],
        "interleave_moe_layer_step": config["interleave_moe_layer_step"],
        "use_qk_norm": config["use_qk_norm"],
        "vocab_size": VOCAB,
        "attn_scale": config["attn_scale"],
    }


def scheme_for(name: str, checkpoint: Checkpoint) -> Scheme:
    """Return the scheme of a format that fits a checkpoint's widths."""
    if name == "fp8":
        return Scheme(number=Number.FLOAT8)
    if name == "int8":
        return Scheme(number=Number.INT8, is_packed=True)
    widths = (checkpoint.config.hidden_size, checkpoint.config.expert_width)
    group = next(size for size in GROUPS if not any(width % size for width in widths))
    return Scheme(number=Number.INT4, group_size=group, is_packed=True)


def texts(model_dir: Path, num_texts: int, length: int) -> list[list[int]]:
    """Let the stored model write, each text from another token and with another seed."""
    sampling = [
        Sampling(temperature=1.0, seed=seed, max_tokens=length - 1, ignore_eos=True) for seed in range(num_texts)
    ]
    with LLM(model_dir, dtype="float32", kv_cache_bytes=KV_CACHE_BYTES) as llm:
        starts = [[1 + 97 * seed % (llm.config.vocab_size - 1)] for seed in range(num_texts)]
        written = llm.generate(starts, sampling)
    return [start + list(one.token_ids) for start, one in zip(starts, written, strict=True)]


def score(model_dir: Path, given: Sequence[list[int]]) -> Tensor:
    """Return the logits [positions, V] of all texts."""
    with LLM(model_dir, dtype="float32", kv_cache_bytes=KV_CACHE_BYTES) as llm:
        return torch.cat([llm.score(text) for text in given])


def errors_of(model_dir: Path, folder: Path, num_texts: int, length: int) -> Iterator[dict[str, Any]]:
    """Yield one row a format."""
    given = texts(model_dir, num_texts, length)
    stored_PV = score(model_dir, given)
    checkpoint = Checkpoint.open(model_dir)
    for name in FORMATS:
        scheme = scheme_for(name, checkpoint)
        result = quantise_checkpoint(model_dir, folder / name, scheme)
        relative = sum(error.relative for error in result.errors) / len(result.errors)
        yield {
            "format": scheme.title,
            "bytes": result.num_bytes,
            "source_bytes": result.source_bytes,
            "mean_relative_weight_error": relative,
            **differences(stored_PV, score(folder / name, given)),
        }


def measured(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory(prefix="llama4-quantisation-") as temporary:
            folder = Path(temporary)
            model_dir = BUNDLED
            if name in PRESETS:
                shape = narrow(name, arguments.layers)
                model_dir = make_checkpoint(folder / "stored", name, dtype=torch.bfloat16, **shape)
            elif name != BUNDLED.name:
                model_dir = Path(name)
            title = f"{name} (synthetic)" if name in SYNTHETIC else name
            found[title] = list(errors_of(model_dir, folder, arguments.texts, arguments.text))
    return found


def report(found: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("model", "format"):
        table.add_column(column)
    for column in ("weights off", "mean KL, nats", "equal greedy", "|logit|, max", "mean", "deviation of stored"):
        table.add_column(column, justify="right")
    for model, rows in found.items():
        table.add_section()
        for row in rows:
            table.add_row(
                model,
                row["format"].replace(", a scale for each ", " / "),
                f"{row['mean_relative_weight_error']:.2%}",
                f"{row['mean_kl_divergence']:.5f}",
                f"{row['equal_greedy_tokens']:.1%}",
                f"{row['max_logit_difference']:.3f}",
                f"{row['mean_logit_difference']:.4f}",
                f"{row['logit_deviation']:.3f}",
            )
    Console(width=140).print(table)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PRESETS, BUNDLED.name]
    parser.add_argument("--models", nargs="+", default=names, help=f"of {', '.join(names)}, or checkpoint folders")
    parser.add_argument("--layers", type=int, default=4, help="of the random checkpoints")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--text", type=int, default=64, help="tokens of each text that is scored")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args(given)
    found = measured(arguments)
    report(found, f"quantised against stored weights, commit {commit()}")
    if arguments.json:
        head = {"benchmark": "quantisation", "at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
        written = head | {"settings": vars(arguments), "found": found}
        arguments.json.write_text(json.dumps(written, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
