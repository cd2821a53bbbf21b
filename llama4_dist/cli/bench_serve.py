"""`llama4-dist bench serve`: an open loop of requests at one rate or several, against a running gateway."""

from dataclasses import asdict, dataclass
from pathlib import Path

from llama4_dist.bench import plot
from llama4_dist.bench.arrivals import plan, send_times
from llama4_dist.bench.clients import run_plan
from llama4_dist.bench.records import wrong
from llama4_dist.bench.statistics import parse_goodput, summarise
from llama4_dist.cli.bench_report import STDOUT, counting, show_columns, write
from llama4_dist.cli.output import reporting
from llama4_dist.client import Client, ConnectOptions

SECRET = ("token",)
SHOWN = (
    "num_prompts",
    "completed",
    "failed",
    "duration",
    "request_throughput",
    "output_throughput",
    "goodput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "mean_itl_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
    "median_e2el_ms",
    "p99_e2el_ms",
    "median_refusal_ms",
    "p99_refusal_ms",
    "p99_send_lag_ms",
    "tokens_per_message",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBench:
    """What to send, and where; lengths are tokens, times seconds."""

    address: str
    rates: str
    num_requests: int
    duration_s: float | None
    warmup_s: float
    input_len: int
    output_len: int
    goodput: str
    burstiness: float
    num_clients: int
    num_connections: int
    seed: int
    token: str | None = None
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    @property
    def options(self) -> ConnectOptions:
        """Credentials; a refusal is a result here and is not retried."""
        return ConnectOptions(
            token=self.token,
            tls_ca=self.tls_ca,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            max_attempts=1,
        )


def run_bench_serve(bench: ServeBench, json_file: Path | None, plot_file: Path | None) -> None:
    """Measure every rate in turn; write JSON, show a table, draw."""
    with reporting(json_file == STDOUT):
        plot.check_plot(plot_file)
        parse_goodput(bench.goodput)
        for field, value in (("num_clients", bench.num_clients), ("num_connections", bench.num_connections)):
            if value < 1:
                raise wrong(field, f"{value}: give at least 1")
        rates = parse_rates(bench.rates)
        with Client(bench.address, bench.options) as client:
            model = client.list_models()[0]
        results = [measure(bench, rate, model.vocab_size, quiet=json_file == STDOUT) for rate in rates]
        settings = {name: value for name, value in asdict(bench).items() if name not in SECRET} | {"model": model.name}
        if write(json_file, "serve", settings, results):
            title = f"{model.name} at {bench.address}: {bench.input_len} tokens in, {bench.output_len} out"
            show_columns(title, SHOWN, results, "request_rate")
        if plot_file is not None:
            plot.plot_sweep(plot_file, results, f"{model.name}: {bench.input_len} tokens in, {bench.output_len} out")


def parse_rates(given: str) -> list[float]:
    """Read "1,2,4,8"."""
    try:
        rates = [float(part) for part in given.split(",")]
    except ValueError:
        raise wrong("rates", f"{given!r}: give numbers of requests a second, e.g. 1,2,4,8") from None
    if not all(rate > 0 for rate in rates):
        raise wrong("rates", f"{given!r}: each must be above 0; inf sends all at once")
    return rates


def measure(bench: ServeBench, rate: float, vocab_size: int, *, quiet: bool) -> dict[str, object]:
    """Run one rate and return its figures."""
    number = bench.num_requests if bench.duration_s is None else max(1, round(rate * bench.duration_s))
    times_s = send_times(rate, number, seed=bench.seed, burstiness=bench.burstiness)
    requests = plan(
        times_s, input_len=bench.input_len, output_len=bench.output_len, vocab_size=vocab_size, seed=bench.seed
    )
    with counting(f"{rate:g} requests/s", number, quiet=quiet) as on_done:
        records = run_plan(
            bench.address,
            bench.options,
            requests,
            num_clients=bench.num_clients,
            num_connections=bench.num_connections,
            on_done=on_done,
        )
    # With a warm-up the window also ends with the last send: what drains afterwards is no steady state.
    until_s = times_s[-1] if bench.warmup_s else None
    objectives = parse_goodput(bench.goodput)
    return {"request_rate": rate, **summarise(records, objectives, skip_s=bench.warmup_s, until_s=until_s)}
