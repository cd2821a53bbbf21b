"""One Behemoth layer at its true size through real attention and expert processes, held against float64.

The geometry is synthetic (see `checkpoint.presets`), the weights are random: 128 heads on a width of 16384, a
shared and 16 routed experts of width 24064, in bfloat16, mapped from disk. The vocabulary is cut to 4096, because the
embedding is not what is shown. Values are written only for the experts that the prompt's tokens are routed to (the
others are holes). Two clusters answer: one with whole experts, one with every expert in 4 slices on 4 hosts.
"""

import argparse
import json
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cluster.ray_engine import RayEngine
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.checkpoint.writing.synth import SynthRequest, synthesise
from llama4_dist.cli.progress import byte_progress
from llama4_dist.engine.options import EngineOptions
from tests.plain_experts import plain

PREFIX = "model.layers.0"
BESIDE_EXPERTS = (f"{PREFIX}.*norm*", f"{PREFIX}.self_attn.*", f"{PREFIX}.feed_forward.router*")
FILLED = (*BESIDE_EXPERTS, f"{PREFIX}.feed_forward.shared_expert.*", "model.norm*", "model.embed*", "lm_head*")
OVERRIDES = ("num_hidden_layers=1", "vocab_size=4096", "eos_token_id=[1]", "bos_token_id=0", "pad_token_id=2")
ROWS = 1024  # rows of a weight that are widened to float64 at a time
MEMORY_BYTES = 24 << 30
TOLERANCE = 0.02  # of the root mean square: bfloat16 keeps 8 bits, and rows are rounded to it five times on their way


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one cluster said: logits [T, V], how far they are from others, and the most memory anybody had."""

    name: str
    logits_TV: Tensor
    error: float  # root mean square of the difference over that of the reference
    same_tokens: int
    seconds: float
    peak_bytes: int  # of the whole machine, file pages left out
    hosts_of_an_expert: int


class Direct:
    """The layer written out in float64, block by block, from the mapped weights. Source: transformers `Llama4Text…`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config

    def hidden(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention and its norm, both [T, D]."""
        x_TD = self._checkpoint.tensor("model.embed_tokens.weight")[list(token_ids)].double()
        x_TD = x_TD + self._attention(self._norm(x_TD, f"{PREFIX}.input_layernorm.weight"))
        return x_TD, self._norm(x_TD, f"{PREFIX}.post_attention_layernorm.weight")

    def route(self, h_TD: Tensor) -> tuple[list[int], Tensor]:
        """Return each token's expert and score."""
        logits_TE = self._linear(h_TD, f"{PREFIX}.feed_forward.router.weight")
        best = logits_TE.max(dim=1)
        return best.indices.tolist(), best.values.sigmoid()

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits [T, V]."""
        x_TD, h_TD = self.hidden(token_ids)
        experts, scores_T = self.route(h_TD)
        prefix = f"{PREFIX}.feed_forward.shared_expert"
        gate_TF, up_TF = (self._linear(h_TD, f"{prefix}.{part}_proj.weight") for part in ("gate", "up"))
        x_TD = x_TD + self._linear(torch.nn.functional.silu(gate_TF) * up_TF, f"{prefix}.down_proj.weight")
        for token, expert in enumerate(experts):
            weights = plain(self._checkpoint.expert(0, expert))
            row_1D = h_TD[token : token + 1] * scores_T[token]
            gate_1F, up_1F = _product(row_1D, weights.gate_DF.T), _product(row_1D, weights.up_DF.T)
            x_TD[token] += _product(torch.nn.functional.silu(gate_1F) * up_1F, weights.down_FD.T)[0]
        return self._linear(self._norm(x_TD, "model.norm.weight"), "lm_head.weight")

    def _attention(self, h_TD: Tensor) -> Tensor:
        config, num_tokens = self._config, len(h_TD)
        q_THC, k_TGC, v_TGC = (
            self._linear(h_TD, f"{PREFIX}.self_attn.{name}_proj.weight").view(num_tokens, -1, config.head_dim)
            for name in "qkv"
        )
        q_THC, k_TGC = self._turned(q_THC), self._turned(k_TGC)
        repeats = config.num_heads // config.num_kv_heads
        k_THC, v_THC = k_TGC.repeat_interleave(repeats, 1), v_TGC.repeat_interleave(repeats, 1)
        scores_HTS = torch.einsum("thc,shc->hts", q_THC, k_THC) / math.sqrt(config.head_dim)
        causal = torch.ones(num_tokens, num_tokens).tril().bool()
        scores_HTS = scores_HTS.masked_fill(~causal, -math.inf).softmax(-1)
        o_TD = torch.einsum("hts,shc->thc", scores_HTS, v_THC).flatten(1)
        return self._linear(o_TD, f"{PREFIX}.self_attn.o_proj.weight")

    def _turned(self, x_THC: Tensor) -> Tensor:
        """Rotate adjacent pairs by position and normalise; layer 0 has rotation and QK-norm."""
        config = self._config
        assert config.rope_layers[0]
        assert config.use_qk_norm
        assert config.rope_scaling is not None
        scaling = config.rope_scaling
        omega = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
        is_long = 2 * math.pi / omega > scaling.original_max_position / scaling.low_freq_factor
        omega = torch.where(is_long, omega / scaling.factor, omega)  # low and high factor are one: there is no band
        turn = torch.polar(torch.ones(()).double(), torch.outer(torch.arange(len(x_THC)).double(), omega))
        pairs = torch.view_as_complex(x_THC.unflatten(-1, (-1, 2)).contiguous()) * turn[:, None]
        turned_THC = torch.view_as_real(pairs).flatten(-2)
        return turned_THC * torch.rsqrt(turned_THC.square().mean(-1, keepdim=True) + config.rms_norm_eps)

    def _norm(self, x_TD: Tensor, name: str) -> Tensor:
        scale_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)
        return x_TD * scale_T1 * self._checkpoint.tensor(name).double()

    def _linear(self, x_TD: Tensor, name: str) -> Tensor:
        return _product(x_TD, self._checkpoint.tensor(name))


def _product(x_TD: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T, some rows of W at a time: the whole of it would not fit beside the others in float64."""
    return torch.cat([x_TD @ rows.double().T for rows in weight.split(ROWS)], dim=1)


class Peak:
    """Watches how much memory is in use on the machine, file pages left out."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            memory = psutil.virtual_memory()
            self.num_bytes = max(self.num_bytes, memory.total - memory.available)


def ask(
    name: str, model_dir: Path, token_ids: Sequence[int], reference_TV: Tensor, *, hosts: int, slices: int
) -> Answer:
    """Start a cluster, let it score the prompt, and compare."""
    options = EngineOptions(max_context=256, num_blocks=64)
    with Peak() as peak, ExitStack() as resources:
        engine = RayEngine(
            model_dir,
            num_expert_hosts=hosts,
            expert_slices=slices,
            num_replicas=1,
            dtype="bfloat16",
            options=options,
            num_threads=2,
            start_timeout_s=900.0,
        )
        resources.callback(engine.close)
        engine.start(lambda outputs: None)
        began_s = time.perf_counter()
        logits_TV = engine.score(token_ids).double()
        seconds = time.perf_counter() - began_s
        hosts_of = engine.control.placement().hosts_of
        of_first = {host for (_, unit), on in hosts_of.items() if unit < slices for host in on}
    difference = (logits_TV - reference_TV).square().mean().sqrt() / reference_TV.square().mean().sqrt()
    return Answer(
        name=name,
        logits_TV=logits_TV,
        error=float(difference),
        same_tokens=int((logits_TV.argmax(1) == reference_TV.argmax(1)).sum()),
        seconds=seconds,
        peak_bytes=peak.num_bytes,
        hosts_of_an_expert=len(of_first),
    )


def prepare(folder: Path, token_ids: Sequence[int]) -> tuple[Path, list[int]]:
    """Write the layer; find out which experts the prompt reaches, and write those too."""
    found = folder / "router-only"
    _synth(found, (*BESIDE_EXPERTS, "model.embed*"))
    checkpoint = Checkpoint.open(found)
    direct = Direct(checkpoint)
    experts, _ = direct.route(direct.hidden(token_ids)[1])
    checkpoint.close()
    used = sorted(set(experts))
    out = folder / "layer"
    if not out.exists():
        _synth(out, FILLED + tuple(f"{PREFIX}.feed_forward.experts.{expert}.*" for expert in used))
    return out, experts


def _synth(out: Path, fill: tuple[str, ...]) -> None:
    if out.exists():
        return
    request = SynthRequest(preset="behemoth", overrides=OVERRIDES, is_sparse=True, fill=fill)
    with byte_progress(f"Writing {out.name}", show=True) as progress:
        synthesise(request, out, progress)


def main() -> None:
    """Run both clusters; exit with 1 where one is off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="7,1290,333,2048", help="the prompt, as ids below 4096")
    parser.add_argument("--dir", type=Path, help="where the checkpoint lies, and stays; 4 to 14 GB")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    token_ids = [int(token) for token in arguments.tokens.split(",")]
    with ExitStack() as resources:
        folder = arguments.dir or Path(resources.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        model_dir, experts = prepare(folder, token_ids)
        checkpoint = Checkpoint.open(model_dir)
        began_s = time.perf_counter()
        reference_TV = Direct(checkpoint).logits(token_ids)
        direct_s = time.perf_counter() - began_s
        checkpoint.close()
        whole = ask("2 hosts, whole experts", model_dir, token_ids, reference_TV, hosts=2, slices=1)
        cut = ask("4 hosts, experts in 4 slices", model_dir, token_ids, reference_TV, hosts=4, slices=4)
    between = float((whole.logits_TV - cut.logits_TV).square().mean().sqrt() / whole.logits_TV.square().mean().sqrt())
    report(arguments.json, (whole, cut), experts=experts, between=between, direct_s=direct_s)
    num_tokens = len(token_ids)
    is_right = all(one.error < TOLERANCE and one.same_tokens == num_tokens for one in (whole, cut))
    raise SystemExit(0 if is_right and between < TOLERANCE and cut.hosts_of_an_expert == 4 else 1)


def report(as_json: bool, answers: Sequence[Answer], *, experts: list[int], between: float, direct_s: float) -> None:
    """Print what was seen."""
    if as_json:
        rows = [{key: getattr(one, key) for key in Answer.__slots__ if key != "logits_TV"} for one in answers]
        print(json.dumps({"experts": experts, "between": between, "direct_s": direct_s, "clusters": rows}))
        return
    table = Table(title=f"A Behemoth layer (synthetic) at true size; tokens go to experts {experts}")
    for column in ("cluster", "RMS error", "same tokens", "hosts of an expert", "seconds", "peak memory"):
        table.add_column(column, justify="left" if column == "cluster" else "right")
    for one in answers:
        memory = f"{one.peak_bytes / 2**30:.1f} of {MEMORY_BYTES >> 30} GiB"
        same = f"{one.same_tokens}/{len(experts)}"
        table.add_row(one.name, f"{one.error:.2e}", same, str(one.hosts_of_an_expert), f"{one.seconds:.2f}", memory)
    console = Console()
    console.print(table)
    console.print(f"4 slices against whole experts: RMS {between:.2e}; float64 took {direct_s:.0f} s")


if __name__ == "__main__":
    main()
