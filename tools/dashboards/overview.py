"""What clients get: traffic, latencies, errors, and how full the engines are."""

from llama4_dist.gateway import metrics as g
from llama4_dist.gateway.observe import engine_families as e
from tools.dashboards.panels import Dashboard, Panel, Row
from tools.dashboards.queries import each, now, percentiles, rate, share, worst

N = e.NUMBERS

OVERVIEW = Dashboard(
    name="overview",
    title="llama4_dist: overview",
    meaning="What clients get: traffic, latencies, errors, and how full the engines are.",
    rows=(
        Row(
            title="Traffic",
            panels=(
                Panel(
                    title="Requests in the engines",
                    meaning="Running ones share the batch; waiting ones have no KV blocks yet.",
                    lines={"running": now(N["requests_running"]), "waiting": now(N["requests_waiting"])},
                ),
                Panel(
                    title="Tokens",
                    meaning="Prompt tokens of admitted requests, and tokens sampled.",
                    lines={"prompt": rate(N["prompt_tokens"]), "generated": rate(N["generated_tokens"])},
                    unit="cps",
                ),
                Panel(
                    title="Ended generations",
                    meaning="By how they ended; error is anything but a stop, a length or a cancel.",
                    lines=each(rate, g.REQUESTS, "finish_reason"),
                    unit="reqps",
                ),
            ),
        ),
        Row(
            title="Latency",
            panels=(
                Panel(
                    title="Time to first token",
                    meaning="From the call to the first token, queue and prefill included.",
                    lines=percentiles(g.FIRST_TOKEN),
                    unit="s",
                ),
                Panel(
                    title="Time between tokens",
                    meaning="Within a stream; a stall of the engine is seen here.",
                    lines=percentiles(g.INTER_TOKEN),
                    unit="s",
                ),
                Panel(
                    title="Whole requests",
                    meaning="From the call to the last token.",
                    lines=percentiles(g.END_TO_END),
                    unit="s",
                ),
                Panel(
                    title="In the queue",
                    meaning="From submission to admission, and the age of the oldest that waits.",
                    lines={**percentiles(g.QUEUE), "oldest": worst(N["max_queue_age_s"])},
                    unit="s",
                ),
            ),
        ),
        Row(
            title="Errors",
            panels=(
                Panel(
                    title="Failed calls by reason",
                    meaning="Reasons are those of docs/grpc.md.",
                    lines=each(rate, g.REFUSALS, "reason"),
                    unit="reqps",
                ),
                Panel(
                    title="Share of generations that failed",
                    meaning="Of those that ended.",
                    lines={"failed": share(rate(g.REQUESTS, where='finish_reason="error"'), rate(g.REQUESTS))},
                    unit="percentunit",
                ),
                Panel(
                    title="Engines that answer",
                    meaning="As each gateway sees them.",
                    lines=each(worst, e.ENGINES, "instance", least=True),
                ),
            ),
        ),
        Row(
            title="KV cache",
            panels=(
                Panel(
                    title="KV blocks in use",
                    meaning="At 1 new sequences wait and old ones are preempted.",
                    lines={
                        "{{worker}} used": worst(e.KV_USED, "worker"),
                        "{{worker}} prefixes": worst(e.KV_CACHED, "worker"),
                    },
                    unit="percentunit",
                ),
                Panel(
                    title="Prompt tokens found in the cache",
                    meaning="Share of the prompt tokens of admitted requests that needed no prefill.",
                    lines={"found": share(rate(N["prefix_tokens"]), rate(N["prompt_tokens"]))},
                    unit="percentunit",
                ),
                Panel(
                    title="Preemptions and evictions",
                    meaning="Sequences computed anew, and cached prefixes given up, for want of blocks.",
                    lines={"preempted": rate(N["preemptions"]), "evicted": rate(N["prefix_evictions"])},
                    unit="cps",
                ),
            ),
        ),
    ),
)
