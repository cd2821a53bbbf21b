"""Writes the table of metrics into docs/observability.md from their declarations: `python -m tools.metrics_table`."""

from collections.abc import Iterable
from pathlib import Path

from cluster.observe.families import CLUSTER_FAMILIES
from llama4_dist.gateway.metrics import GATEWAY_FAMILIES
from llama4_dist.gateway.observe.dispatch_families import DISPATCH_FAMILIES
from llama4_dist.gateway.observe.engine_families import ENGINE_FAMILIES
from llama4_dist.gateway.observe.family import Family

PAGE = Path(__file__).parents[1] / "docs" / "observability.md"
BEGIN, END = "<!-- metrics: python -m tools.metrics_table -->", "<!-- end of metrics -->"
PARTS = {
    "Gateway": GATEWAY_FAMILIES,
    "Engines": ENGINE_FAMILIES,
    "From attention to experts": DISPATCH_FAMILIES,
    "Cluster": CLUSTER_FAMILIES,
}


def table(families: Iterable[Family]) -> str:
    """Return one table."""
    rows = (
        f"| `{family.name}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels)} | {family.meaning} |"
        for family in families
    )
    return "\n".join(("| name | type | labels | meaning |", "|---|---|---|---|", *rows))


def page(text: str) -> str:
    """Return the page with the tables of now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join(f"### {title}\n\n{table(families)}" for title, families in PARTS.items())
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
