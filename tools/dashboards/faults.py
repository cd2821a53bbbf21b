"""What changes, what breaks, and what was done about it."""

from cluster.observe import families as c
from llama4_dist.gateway.observe import dispatch_families as d
from llama4_dist.gateway.observe import engine_families as e
from tools.dashboards.panels import Dashboard, Panel, Row
from tools.dashboards.queries import each, now, rate, series, worst

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
                    lines=each(now, c.UP, "role"),
                ),
                Panel(
                    title="Since a worker last answered",
                    meaning="The controller asks every half second.",
                    lines=each(worst, c.HEARTBEAT, "worker"),
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
                    lines=each(now, c.RUNNING, "kind", "phase"),
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
                    lines=each(rate, d.BY_HOST["hedged_rows"], "host"),
                    unit="cps",
                ),
                Panel(
                    title="Rows sent again, late replies",
                    meaning="Resent rows include hedges; late replies had been answered by another host.",
                    lines={"resent": rate(d.NUMBERS["resent_rows"]), "late": rate(d.NUMBERS["late_replies"])},
                    unit="cps",
                ),
                Panel(
                    title="Links lost, frames refused",
                    meaning="By reason.",
                    lines={
                        "lost {{reason}}": rate(d.BY_REASON["lost_links"], "reason"),
                        "refused {{reason}}": rate(d.BY_REASON["refused_frames"], "reason"),
                        "refused by hosts {{reason}}": rate(c.REFUSALS, "reason"),
                        "closed by hosts {{reason}}": rate(c.CLOSED, "reason"),
                    },
                    unit="cps",
                ),
                Panel(
                    title="Adoptions",
                    meaning="Experts a host took on because nobody else served them.",
                    lines=each(rate, c.ADOPTED, "worker"),
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
                    lines=each(rate, e.NUMBERS["step_held_s"], "worker"),
                    unit="percentunit",
                ),
                Panel(
                    title="Replays",
                    meaning="Requests that went on with another engine, by the one that was lost.",
                    lines=each(rate, e.REPLAYED, "worker"),
                    unit="reqps",
                ),
                Panel(
                    title="Wrong answers",
                    meaning="Of hosts that a cross-check and a referee proved wrong; each is barred.",
                    lines={
                        "{{host}}": rate(d.BY_HOST["wrong_answers"], "host"),
                        "checked": rate(d.NUMBERS["checked_frames"]),
                    },
                    unit="cps",
                ),
            ),
        ),
    ),
)
