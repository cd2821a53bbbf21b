"""One chaos run: a cluster, load on it, blows by schedule, and the verdict of the record."""

import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from llama4_dist.chaos.blows import Blows
from llama4_dist.chaos.cases import answers_of, make_cases, prompts_of
from llama4_dist.chaos.history import History, read_history
from llama4_dist.chaos.history.verdict import Rules, Verdict, judge
from llama4_dist.chaos.load import Load
from llama4_dist.chaos.schedule import ChaosPlan, steps
from llama4_dist.chaos.serving import serving
from llama4_dist.client import Client
from llama4_dist.client.admin import AdminClient

DRAIN_S = 120.0
KV_USAGE = "llama4_dist_kv_cache_usage_ratio"
TICK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    """What is served, and how much is asked of it at once."""

    model: Path
    num_experts: int = 4
    num_attention: int = 2
    num_stages: int = 1  # of each attention worker
    num_ranks: int = 1  # of each stage
    num_gateways: int = 1
    num_streams: int = 4
    max_tokens: int = 48
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a run goes."""

    elapsed_s: float
    num_done: int
    num_failed: int
    num_tokens: int
    num_struck: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosResult:
    """How it went."""

    verdict: Verdict
    num_struck: int
    num_skipped: int
    ended_in_time: bool
    kv_usage: float  # share of the KV cache that is held although nothing runs

    @property
    def has_passed(self) -> bool:
        sound = self.verdict.has_passed and self.verdict.num_compared > 0
        return sound and self.ended_in_time and self.kv_usage == 0.0


def run_chaos(
    options: ChaosOptions, plan: ChaosPlan, history_file: Path, *, on_progress: Callable[[Progress], None]
) -> ChaosResult:
    """Serve, load, strike and judge; nothing that was started is left behind."""
    cases = make_cases(prompts_of(options.model), max_tokens=options.max_tokens)
    reference = answers_of(options.model, cases, dtype=options.dtype, num_ranks=options.num_ranks)
    cut = ("--stages", str(options.num_stages), "--tensor", str(options.num_ranks))
    with (
        serving(
            options.model,
            num_experts=options.num_experts,
            num_attention=options.num_attention,
            num_gateways=options.num_gateways,
            flags=("--dtype", options.dtype, *cut),
        ) as served,
        History(history_file, seed=plan.seed) as history,
        AdminClient(served.admin_address) as admin,
    ):
        with Client(served.addresses) as client:
            client.wait_ready(60.0)
        load = Load(served.addresses, cases, history, num_streams=options.num_streams, prefix=f"chaos-{plan.seed}")
        blows = Blows(admin, history, served.gateways)
        ended_in_time = strike_under_load(load, blows, plan, on_progress)
        kv_usage = kv_usage_of(served.metrics_address)
    verdict = judge(read_history([history_file]), reference, Rules())
    return ChaosResult(
        verdict=verdict,
        num_struck=blows.num_struck,
        num_skipped=blows.num_skipped,
        ended_in_time=ended_in_time,
        kv_usage=kv_usage,
    )


def kv_usage_of(metrics_address: str | None) -> float:
    """Read how much of the KV cache is held; 0 where there is no page to read."""
    if metrics_address is None:
        return 0.0
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    return sum(sample.value for family in families for sample in family.samples if sample.name == KV_USAGE)


def strike_under_load(load: Load, blows: Blows, plan: ChaosPlan, on_progress: Callable[[Progress], None]) -> bool:
    """Run load and schedule side by side; tell whether every request ended once the load was told to stop."""
    begun_s, stop = time.monotonic(), threading.Event()
    load.start()
    striking = threading.Thread(target=blows.run, args=(steps(plan), stop), name="blows", daemon=True)
    striking.start()
    try:
        while (elapsed_s := time.monotonic() - begun_s) < plan.duration_s or striking.is_alive():
            on_progress(
                Progress(
                    elapsed_s=elapsed_s,
                    num_done=load.num_done,
                    num_failed=load.num_failed,
                    num_tokens=load.num_tokens,
                    num_struck=blows.num_struck,
                )
            )
            time.sleep(TICK_S)
    finally:
        stop.set()
        striking.join(DRAIN_S)
        ended_in_time = load.stop(DRAIN_S)
    return ended_in_time
