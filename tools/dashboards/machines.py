"""What the processes take."""

from cluster.observe import families as c
from llama4_dist.gateway import metrics as g
from llama4_dist.gateway.observe import dispatch_families as d
from llama4_dist.gateway.observe import engine_families as e
from tools.dashboards.panels import Dashboard, Panel, Row
from tools.dashboards.queries import each, now, percentiles, rate, share, worst

MACHINES = Dashboard(
    name="machines",
    title="llama4_dist: processes and machines",
    meaning="What the processes take. Disks, networks and cards are the node exporters' to tell.",
    rows=(
        Row(
            title="Workers",
            panels=(
                Panel(
                    title="Resident memory",
                    meaning="Pages of the checkpoint that processes share are counted with each.",
                    lines=each(now, c.MEMORY, "worker"),
                    unit="bytes",
                ),
                Panel(
                    title="Processors",
                    meaning="Cores that a worker keeps busy.",
                    lines=each(rate, c.CPU, "worker"),
                ),
                Panel(
                    title="Weights held",
                    meaning="By expert host.",
                    lines=each(now, c.WEIGHTS, "worker"),
                    unit="bytes",
                ),
                Panel(
                    title="Links",
                    meaning="To attention workers, by expert host.",
                    lines=each(now, c.LINKS, "worker"),
                ),
            ),
        ),
        Row(
            title="Gateways",
            panels=(
                Panel(
                    title="Generations in the gateways",
                    meaning="By gateway.",
                    lines=each(now, g.IN_FLIGHT, "instance"),
                ),
                Panel(
                    title="Calls",
                    meaning="By method and status code.",
                    lines=each(rate, g.CALLS, "method", "code"),
                    unit="reqps",
                ),
                Panel(
                    title="Tokens a message",
                    meaning="More than one where steps come faster than messages go.",
                    lines={"tokens": share(rate(g.STREAMED_TOKENS), rate(g.STREAM_MESSAGES))},
                ),
                Panel(
                    title="From a step to its streams",
                    meaning="From a step's end to the waking of its last reader.",
                    lines=percentiles(g.STREAM),
                    unit="s",
                ),
            ),
        ),
        Row(
            title="Engines",
            panels=(
                Panel(title="Steps", meaning="A second.", lines=each(rate, e.NUMBERS["steps"], "worker"), unit="cps"),
                Panel(
                    title="Rows sent to hosts",
                    meaning="By attention worker, or group: a copy of the model.",
                    lines=each(rate, d.BY_HOST["host_rows"], "group"),
                    unit="cps",
                ),
                Panel(
                    title="Age of what is shown of workers",
                    meaning="Since the controller last answered; its families are absent meanwhile.",
                    lines={"age": worst(c.READING_AGE)},
                    unit="s",
                ),
            ),
        ),
    ),
)
