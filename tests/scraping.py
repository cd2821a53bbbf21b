"""Reads a metrics port, or a registry's families, the way Prometheus does."""

import urllib.request
from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """Samples of one moment."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {family.name: family for family in families}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float | None:
        """Return the one sample of that name (without the prefix) that has these labels; None if there is none."""
        found = self.all(name, **labels)
        assert len(found) <= 1, f"{name} {labels} has {len(found)} series"
        return found[0] if found else None

    def all(self, name: str, **labels: str) -> list[float]:
        """Return every such sample."""
        return [
            sample.value
            for sample in self.samples
            if sample.name == f"llama4_dist_{name}" and labels.items() <= sample.labels.items()
        ]

    def labels(self, name: str, label: str) -> set[str]:
        """Return the values that a label has."""
        return {sample.labels[label] for sample in self.samples if sample.name == f"llama4_dist_{name}"}


def scrape(port: int | None) -> Scrape:
    """Read a port of this machine."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return Scrape(text_string_to_metric_families(answer.read().decode()))
