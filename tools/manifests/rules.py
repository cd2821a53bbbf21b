"""Writes the alarms of deploy/prometheus/alerts.yaml as the PrometheusRule of components/monitoring."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.manifests.objects import Overlay

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
RULES = ROOT / "deploy" / "kubernetes" / "components" / "monitoring" / "rules.yaml"
HEADER = (
    "# Written by `python -m tools.manifests.rules` from deploy/prometheus/alerts.yaml; explained in docs/alarms.md.\n"
)


def rule_object(groups: Any) -> dict[str, Any]:
    """Return the PrometheusRule of some groups."""
    metadata = {"name": "llama4"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata,
        "spec": {"groups": groups},
    }


def check_rules(overlay: Overlay) -> Iterator[str]:
    """Yield a difference between the rules that are deployed and those that are documented."""
    if not ALERTS.exists():
        return
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    for one in overlay.of("PrometheusRule"):
        if one["spec"]["groups"] != groups:
            name = one["metadata"]["name"]
            yield f"PrometheusRule/{name} differs from {ALERTS.name}: run `python -m tools.manifests.rules`"


def write(alerts: Path = ALERTS, rules: Path = RULES) -> None:
    """Write the rules anew."""
    groups = yaml.safe_load(alerts.read_text(encoding="utf-8"))["groups"]
    text = yaml.safe_dump(rule_object(groups), sort_keys=False, width=100, allow_unicode=True)
    rules.write_text(f"{HEADER}---\n{text}", encoding="utf-8")


if __name__ == "__main__":
    write()
