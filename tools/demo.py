"""`make demo`: a Ray cluster with four expert hosts, a gateway, real prompts, and what went where.

Everything goes the way a user's request goes: `llama4-dist serve` in a process of its own, the Python client over gRPC,
the gateway's Prometheus page for the figures. Then requests run without a pause while the expert hosts become six, one
of them is killed, and they become three. The same prompts in one process without Ray are the measure: all tokens must
be identical.
"""

import argparse
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from llama4_dist.chaos.cases import answers_of, make_cases, prompts_of
from llama4_dist.chaos.faults import Kill
from llama4_dist.chaos.history import History, read_history
from llama4_dist.chaos.history.verdict import Rules, judge
from llama4_dist.chaos.load import Load
from llama4_dist.chaos.serving import Serving, serving
from llama4_dist.client import Client
from llama4_dist.client.admin import AdminClient
from llama4_dist.client.admin_results import Operation, Worker
from llama4_dist.errors import ConflictError
from llama4_dist.request import Completion, Sampling

ROOT = Path(__file__).parents[1]
PROMPTS = (
    "In the beginning God created",
    "Call me Ishmael. Some years ago",
    "The whale rose slowly out of the sea, and the captain",
    "Gentlemen of the Senate and House of Representatives, the state of the Union",
)
SHUTDOWN_S = 60
QUIET_S = 3.0


@dataclass(slots=True)
class Shown:
    """What the screen shows of one stream."""

    prompt: str
    text: str = ""
    num_tokens: int = 0
    completion: Completion | None = None
    error: Exception | None = None


@dataclass(slots=True)
class Traffic:
    """Sums read from the metrics page."""

    rows: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes_out: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes_in: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: float = 0
    tokens: float = 0


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "llama4-mini")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    console = Console()
    # Drawn, not greedy: a model this small repeats itself when greedy. The seed makes it the same text everywhere.
    sampling = Sampling(temperature=0.6, top_p=0.9, seed=4, max_tokens=options.max_tokens)
    begun = time.monotonic()
    with ExitStack() as resources:
        with console.status(f"starting Ray, 1 attention worker, {options.experts} expert hosts, a gateway …"):
            flags = ("--dtype", "float32")
            cluster = serving(options.model, num_experts=options.experts, num_attention=1, flags=flags)
            served = resources.enter_context(cluster)
        console.print(f"ready after {time.monotonic() - begun:.1f} s: gateway {served.addresses}\n")
        with Client(served.addresses) as client:
            begun = time.monotonic()
            streams = run_prompts(client, sampling, console)
            seconds = time.monotonic() - begun
        traffic = read_traffic(f"http://{served.metrics_address}/metrics")
        failed = [stream for stream in streams if stream.error is not None or stream.completion is None]
        for stream in failed:
            console.print(f"[bold red]failed:[/] {stream.prompt!r}: {stream.error}")
        if failed:
            return 1
        show_traffic(console, traffic, seconds)
        if check_against_one_process(options.model, sampling, streams, console):
            return 1
        return 0 if change_under_load(options.model, served, console) else 1


def change_under_load(model: Path, served: Serving, console: Console) -> bool:
    """Scale to six hosts, kill one and scale to three while requests run; tell whether nobody noticed."""
    console.print("\n[bold]Requests without a pause, while expert hosts come, die and go[/]")
    with console.status("what one process answers, for comparison …"):
        cases = make_cases(prompts_of(model), max_tokens=48)
        reference = answers_of(model, cases, dtype="float32")
    with TemporaryDirectory(prefix="llama4-demo-") as folder, AdminClient(served.admin_address) as admin:
        file = Path(folder) / "history.jsonl"
        with History(file, seed=0) as history:
            load = Load(served.addresses, cases, history, num_streams=4, prefix="demo")
            load.start()
            try:
                time.sleep(QUIET_S)  # the measure of what is usual
                for change in (partial(scale_to, 6), kill_one, partial(scale_to, 3)):
                    change(admin, history, console)
            finally:
                ended = load.stop(SHUTDOWN_S)
        verdict = judge(read_history([file]), reference, Rules())
    longest = f"longest gap between two tokens {1000 * verdict.gaps.max_s:.0f} ms"
    usual = f"{1000 * verdict.healthy_gaps.p99_s:.0f} ms is the 99th percentile without a fault"
    console.print(f"{verdict.num_compared} requests, {verdict.num_tokens} tokens; {longest} ({usual})", highlight=False)
    for violation in verdict.violations:
        console.print(f"[bold red]{violation.kind}[/] {violation.request_id} {violation.detail}")
    if not (ended and verdict.has_passed and verdict.num_compared):
        return False
    console.print("[green]no request was refused or lost, and every token is that of the single process[/]")
    return True


def scale_to(num_hosts: int, admin: AdminClient, history: History, console: Console) -> None:
    """Scale, and say what that took."""
    with history.operation(f"scale to {num_hosts}"):
        done = admin.wait(begin_scaling(num_hosts, admin).name, timeout_s=SHUTDOWN_S)
    change, paused_ms = done.change, 1000 * done.paused_s
    assert change is not None
    told = f"  {change.hosts_before} → {change.hosts_after} hosts: {done.phase}, {change.num_moves} experts moved"
    console.print(f"{told}, serving stood still for {paused_ms:.1f} ms", highlight=False)


def begin_scaling(num_hosts: int, admin: AdminClient) -> Operation:
    """Scale as soon as no repair is under way: a host that serves again may still be given its copies."""
    deadline = time.monotonic() + SHUTDOWN_S
    while True:
        try:
            return admin.scale(num_hosts)
        except ConflictError:
            if time.monotonic() > deadline:
                raise
            for one in admin.operations():
                admin.wait(one.name, timeout_s=SHUTDOWN_S)


def kill_one(admin: AdminClient, history: History, console: Console) -> None:
    """Kill an expert host, and wait until the cluster has replaced it."""
    victim = next(one for one in admin.status().workers if one.role == "expert")
    begun = time.monotonic()
    with history.fault(Kill(victim.pid), name="kill", phase="serving"):
        while not is_replaced(victim, admin):
            if time.monotonic() - begun > SHUTDOWN_S:
                raise SystemExit(f"{victim.worker} was not replaced")
            time.sleep(0.1)
    seconds = time.monotonic() - begun
    console.print(f"  {victim.worker} killed (pid {victim.pid}): replaced after {seconds:.1f} s", highlight=False)


def is_replaced(victim: Worker, admin: AdminClient) -> bool:
    """Tell whether another process serves in the victim's place."""
    now = [one for one in admin.status().workers if one.worker == victim.worker]
    return any(one.state == "ready" and one.pid != victim.pid for one in now)


def run_prompts(client: Client, sampling: Sampling, console: Console) -> list[Shown]:
    """Stream all prompts at once and show them growing."""
    streams = [Shown(prompt=prompt) for prompt in PROMPTS]
    total = len(streams) * (sampling.max_tokens or 1)
    progress = Progress(TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), console=console)
    task = progress.add_task("", total=total)
    threads = [threading.Thread(target=follow, args=(client, sampling, stream)) for stream in streams]

    def picture() -> Group:
        progress.update(task, completed=sum(stream.num_tokens for stream in streams))
        panels = [Panel(Text.assemble((one.prompt, "bold"), one.text), border_style="dim") for one in streams]
        return Group(*panels, progress)

    with Live(get_renderable=picture, console=console, refresh_per_second=12):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        progress.update(task, total=sum(stream.num_tokens for stream in streams))
    console.print()
    return streams


def follow(client: Client, sampling: Sampling, shown: Shown) -> None:
    """Read one stream to its end."""
    try:
        stream = client.stream_generate(shown.prompt, sampling)
        for delta in stream:
            shown.text += delta.text
            shown.num_tokens += len(delta.token_ids)
        shown.completion = stream.completion
    except Exception as error:  # noqa: BLE001 (shown and turned into the exit code by main)
        shown.error = error


def read_traffic(url: str) -> Traffic:
    """Sum the gateway's metrics per expert host and station."""
    traffic = Traffic()
    with urllib.request.urlopen(url, timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    for sample in (sample for family in families for sample in family.samples):
        match sample.name.removeprefix("llama4_dist_"):
            case "dispatch_rows_total":
                traffic.rows[sample.labels["host"]] += sample.value
            case "dispatch_bytes_total":
                direction = traffic.bytes_out if sample.labels["direction"] == "out" else traffic.bytes_in
                direction[sample.labels["host"]] += sample.value
            case "station_seconds_total":
                traffic.seconds[sample.labels["station"]] += sample.value
            case "engine_steps_total":
                traffic.steps = sample.value
            case "generation_tokens_total":
                traffic.tokens = sample.value
    return traffic


def show_traffic(console: Console, traffic: Traffic, seconds: float) -> None:
    """Print rows and bytes per expert host, and time per station."""
    hosts = Table(title="What went where", title_justify="left")
    for column in ("expert host", "token rows", "share", "KiB out", "KiB back"):
        hosts.add_column(column, justify="left" if column == "expert host" else "right")
    rows_in_all = sum(traffic.rows.values()) or 1
    for host in sorted(traffic.rows):
        rows = traffic.rows[host]
        sizes = (f"{traffic.bytes_out[host] / 1024:,.0f}", f"{traffic.bytes_in[host] / 1024:,.0f}")
        hosts.add_row(host, f"{rows:,.0f}", f"{rows / rows_in_all:.0%}", *sizes)
    console.print(hosts)
    stations = Table(title="Time per station of the attention worker", title_justify="left")
    for column in ("station", "seconds", "ms a step"):
        stations.add_column(column, justify="left" if column == "station" else "right")
    for station, spent in sorted(traffic.seconds.items(), key=lambda item: -item[1]):
        stations.add_row(station, f"{spent:.3f}", f"{1000 * spent / max(traffic.steps, 1):.2f}")
    console.print(stations)
    console.print(
        f"{traffic.tokens:.0f} tokens in {traffic.steps:.0f} steps, {traffic.tokens / seconds:.0f} tokens/s\n"
    )


def check_against_one_process(model: Path, sampling: Sampling, streams: list[Shown], console: Console) -> int:
    """Run the same prompts without Ray; identical tokens are the proof that experts may live anywhere."""
    from llama4_dist import LLM

    with console.status("the same prompts in one process, without Ray …"), LLM(model, dtype="float32") as llm:
        alone = llm.generate([stream.prompt for stream in streams], sampling)
    different = [
        stream.prompt
        for stream, one in zip(streams, alone, strict=True)
        if stream.completion is None or stream.completion.token_ids != one.token_ids
    ]
    if different:
        console.print(f"[bold red]tokens differ from the single process for {different}[/]")
        return 1
    console.print(f"[green]{len(streams)} of {len(streams)} streams are token-identical to the single process[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
