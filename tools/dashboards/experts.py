"""How rows get to experts: load of the hosts, balance, and what attention waits for."""

from cluster.observe import families as c
from llama4_dist.gateway.observe import dispatch_families as d
from llama4_dist.gateway.observe import engine_families as e
from tools.dashboards.panels import Dashboard, Panel, Row
from tools.dashboards.queries import each, mean, mean_rate, now, percentiles, rate, share, worst

EXPERTS = Dashboard(
    name="experts",
    title="llama4_dist: experts",
    meaning="How rows get to experts: load of the hosts, balance, and what attention waits for.",
    rows=(
        Row(
            title="Load",
            panels=(
                Panel(
                    title="Rows computed",
                    meaning="By expert host.",
                    lines=each(rate, c.TOKENS, "worker"),
                    unit="cps",
                ),
                Panel(
                    title="Busy",
                    meaning="Share of the time that a host computed.",
                    lines=each(rate, c.COMPUTE, "worker"),
                    unit="percentunit",
                ),
                Panel(
                    title="Frames that wait",
                    meaning="By host; a queue that stays means the host is too slow for what it gets.",
                    lines=each(now, c.QUEUE, "worker"),
                ),
            ),
        ),
        Row(
            title="Balance",
            panels=(
                Panel(
                    title="Balance by layer",
                    meaning="Mean load of the layer's hosts over that of the busiest, over half a minute; 1 is even.",
                    lines={"layer {{layer}}": worst(c.BALANCE, "layer", least=True)},
                ),
                Panel(
                    title="Balance",
                    meaning="The mean over layers.",
                    lines={"balance": worst(c.BALANCE_MEAN, least=True)},
                    kind="gauge",
                    unit="percentunit",
                ),
                Panel(
                    title="Hottest experts",
                    meaning="Rows by (layer, expert); empty without --expert-metrics.",
                    lines={"{{layer}}/{{expert}}": f"topk(10, {rate(c.EXPERT_TOKENS, 'layer', 'expert')})"},
                    unit="cps",
                ),
            ),
        ),
        Row(
            title="Between attention and experts",
            panels=(
                Panel(
                    title="From a frame to its answer",
                    meaning="Wire, queue and arithmetic of the host.",
                    lines=percentiles(d.LATENCY),
                    unit="s",
                ),
                Panel(
                    title="Slowest hosts",
                    meaning="Time of frames under way to a host, per second: many at once count many times.",
                    lines=each(rate, d.BY_HOST["reply_seconds"], "host"),
                    unit="percentunit",
                ),
                Panel(
                    title="Attention waits for experts",
                    meaning="Share of the time that steps waited with nothing to do, by who sent the rows.",
                    lines=each(rate, d.NUMBERS["wait_on_experts_s"], "worker"),
                    unit="percentunit",
                ),
                Panel(
                    title="Bytes of rows",
                    meaning="By direction and how they travel.",
                    lines=each(rate, d.BYTES, "direction", "transport"),
                    unit="Bps",
                ),
            ),
        ),
        Row(
            title="Stages of attention groups",
            panels=(
                Panel(
                    title="Busy",
                    meaning="Share of the time that a stage computed, mean over ranks; the busiest binds its group.",
                    lines={"{{group}} stage {{stage}}": mean_rate(c.BUSY, "group", "stage")},
                    unit="percentunit",
                ),
                Panel(
                    title="Of that, waiting for experts",
                    meaning="Share of the time; a worker that is not cut is a stage too.",
                    lines={"{{group}} stage {{stage}}": mean_rate(d.NUMBERS["wait_on_experts_s"], "group", "stage")},
                    unit="percentunit",
                ),
                Panel(
                    title="Waiting for the stage before",
                    meaning="Share of the time that a part was planned and its rows were not there.",
                    lines={"{{group}} stage {{stage}}": mean_rate(c.STARVED, "group", "stage")},
                    unit="percentunit",
                ),
            ),
        ),
        Row(
            title="A step",
            panels=(
                Panel(
                    title="Mean time at each station",
                    meaning="Of the steps that came by; stations are those of docs/observability.md.",
                    lines=each(mean, e.STATIONS, "station"),
                    unit="s",
                ),
                Panel(
                    title="The forward pass",
                    meaning="All of the model, waits included.",
                    lines=percentiles(e.STATIONS, where='station="model"'),
                    unit="s",
                ),
                Panel(
                    title="Frames that shared a computation",
                    meaning="Share of a host's frames; high where several attention workers meet.",
                    lines={"{{worker}}": share(rate(c.POOLED, "worker"), rate(c.FRAMES, "worker"))},
                    unit="percentunit",
                ),
            ),
        ),
    ),
)
