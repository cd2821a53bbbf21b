"""The four dashboards: what is served, how experts are loaded, what changes and breaks, what the machines do."""

from cluster.observe import families as c
from llama4_dist.gateway import metrics as g
from llama4_dist.gateway.observe import engine_families as e
from llama4_dist.gateway.observe.family import Family
from tools.dashboards.panels import Dashboard, Panel, Row
from tools.dashboards.queries import mean, now, quantile, rate, series, share, worst

N, M = e.NUMBERS, e.MAPPINGS


def percentiles(family: Family, *by: str, where: str = "") -> dict[str, str]:
    """Return the usual three."""
    return {f"p{round(100 * one)}": quantile(one, family, *by, where=where) for one in (0.5, 0.95, 0.99)}


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
                    lines={"{{finish_reason}}": rate(g.REQUESTS, "finish_reason")},
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
                    lines={"{{reason}}": rate(g.REFUSALS, "reason")},
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
                    lines={"{{instance}}": worst(e.ENGINES, "instance", least=True)},
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
                    lines={"{{worker}}": rate(c.TOKENS, "worker")},
                    unit="cps",
                ),
                Panel(
                    title="Busy",
                    meaning="Share of the time that a host computed.",
                    lines={"{{worker}}": rate(c.COMPUTE, "worker")},
                    unit="percentunit",
                ),
                Panel(
                    title="Frames that wait",
                    meaning="By host; a queue that stays means the host is too slow for what it gets.",
                    lines={"{{worker}}": now(c.QUEUE, "worker")},
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
                    lines=percentiles(e.LATENCY),
                    unit="s",
                ),
                Panel(
                    title="Slowest hosts",
                    meaning="Time of frames under way to a host, per second: many at once count many times.",
                    lines={"{{host}}": rate(M["reply_seconds"], "host")},
                    unit="percentunit",
                ),
                Panel(
                    title="Attention waits for experts",
                    meaning="Share of the time that a worker's steps waited with nothing to do.",
                    lines={"{{worker}}": rate(N["wait_on_experts_s"], "worker")},
                    unit="percentunit",
                ),
                Panel(
                    title="Bytes of rows",
                    meaning="By direction and how they travel.",
                    lines={"{{direction}} {{transport}}": rate(e.BYTES, "direction", "transport")},
                    unit="Bps",
                ),
            ),
        ),
        Row(
            title="A step",
            panels=(
                Panel(
                    title="Mean time at each station",
                    meaning="Of the steps that came by; stations are those of docs/observability.md.",
                    lines={"{{station}}": mean(e.STATIONS, "station")},
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

FAULTS = Dashboard(
    name="faults",
    title="llama4_dist: elasticity and faults",
    meaning="What changes, what breaks, and what was done about it.",
    rows=(
        Row(
            title="Workers",
            panels=(
                Panel(
                    title="Workers that are up",
                    meaning="By role; below what was asked for while a successor starts.",
                    lines={"{{role}}": now(c.UP, "role")},
                ),
                Panel(
                    title="Since a worker last answered",
                    meaning="The controller asks every half second.",
                    lines={"{{worker}}": worst(c.HEARTBEAT, "worker")},
                    unit="s",
                ),
                Panel(
                    title="Controller and head of Ray",
                    meaning="While either is away serving goes on and nothing can be changed.",
                    lines={"controller": worst(c.CONTROLLER_UP, least=True), "head": worst(c.HEAD_UP, least=True)},
                ),
                Panel(
                    title="Workers lost",
                    meaning="Processes found gone or silent, in the last hour.",
                    lines={"{{worker}}": f"sum by (worker) (increase({series(c.LOST)}[1h])) > 0"},
                ),
            ),
        ),
        Row(
            title="Changes",
            panels=(
                Panel(
                    title="Epoch",
                    meaning="Of the placement, and the oldest that an attention worker uses.",
                    lines={"published": worst(c.EPOCH), "oldest in use": worst(c.ADOPTED_EPOCH, least=True)},
                ),
                Panel(
                    title="Changes that ended",
                    meaning="In the last hour, by kind and result.",
                    lines={"{{kind}} {{result}}": f"sum by (kind, result) (increase({series(c.ENDED)}[1h]))"},
                ),
                Panel(
                    title="The change under way",
                    meaning="Kind and phase.",
                    lines={"{{kind}} {{phase}}": now(c.RUNNING, "kind", "phase")},
                ),
                Panel(
                    title="Fewest copies of an expert",
                    meaning="Over all layers. At 1 a death costs an adoption, at 0 one is under way.",
                    lines={"copies": worst(c.REPLICAS, least=True)},
                ),
            ),
        ),
        Row(
            title="Faults the data plane met by itself",
            panels=(
                Panel(
                    title="Hedged rows by the host that was slow",
                    meaning="Asked of a replica too.",
                    lines={"{{host}}": rate(M["hedged_rows"], "host")},
                    unit="cps",
                ),
                Panel(
                    title="Rows sent again, late replies",
                    meaning="Resent rows include hedges; late replies had been answered by another host.",
                    lines={"resent": rate(N["resent_rows"]), "late": rate(N["late_replies"])},
                    unit="cps",
                ),
                Panel(
                    title="Links lost, frames refused",
                    meaning="By reason.",
                    lines={
                        "lost {{reason}}": rate(M["lost_links"], "reason"),
                        "refused {{reason}}": rate(M["refused_frames"], "reason"),
                        "refused by hosts {{reason}}": rate(c.REFUSALS, "reason"),
                        "closed by hosts {{reason}}": rate(c.CLOSED, "reason"),
                    },
                    unit="cps",
                ),
                Panel(
                    title="Adoptions",
                    meaning="Experts a host took on because nobody else served them.",
                    lines={"{{worker}}": rate(c.ADOPTED, "worker")},
                    unit="cps",
                ),
            ),
        ),
        Row(
            title="What clients might have noticed",
            panels=(
                Panel(
                    title="Stalls",
                    meaning="Share of the time that steps were held because no host served an expert.",
                    lines={"{{worker}}": rate(N["step_held_s"], "worker")},
                    unit="percentunit",
                ),
                Panel(
                    title="Replays",
                    meaning="Requests that went on with another engine, by the one that was lost.",
                    lines={"{{worker}}": rate(e.REPLAYED, "worker")},
                    unit="reqps",
                ),
                Panel(
                    title="Wrong answers",
                    meaning="Of hosts that a cross-check and a referee proved wrong; each is barred.",
                    lines={"{{host}}": rate(M["wrong_answers"], "host"), "checked": rate(N["checked_frames"])},
                    unit="cps",
                ),
            ),
        ),
    ),
)

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
                    lines={"{{worker}}": now(c.MEMORY, "worker")},
                    unit="bytes",
                ),
                Panel(
                    title="Processors",
                    meaning="Cores that a worker keeps busy.",
                    lines={"{{worker}}": rate(c.CPU, "worker")},
                ),
                Panel(
                    title="Weights held",
                    meaning="By expert host.",
                    lines={"{{worker}}": now(c.WEIGHTS, "worker")},
                    unit="bytes",
                ),
                Panel(
                    title="Links",
                    meaning="To attention workers, by expert host.",
                    lines={"{{worker}}": now(c.LINKS, "worker")},
                ),
            ),
        ),
        Row(
            title="Gateways",
            panels=(
                Panel(
                    title="Generations in the gateways",
                    meaning="By gateway.",
                    lines={"{{instance}}": now(g.IN_FLIGHT, "instance")},
                ),
                Panel(
                    title="Calls",
                    meaning="By method and status code.",
                    lines={"{{method}} {{code}}": rate(g.CALLS, "method", "code")},
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
                Panel(title="Steps", meaning="A second.", lines={"{{worker}}": rate(N["steps"], "worker")}, unit="cps"),
                Panel(
                    title="Rows sent to hosts",
                    meaning="By attention worker.",
                    lines={"{{worker}}": rate(M["host_rows"], "worker")},
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

BOARDS = (OVERVIEW, EXPERTS, FAULTS, MACHINES)
