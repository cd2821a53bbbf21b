"""Compares what a metrics port says with what is declared."""

from cluster.observe.families import CLUSTER_FAMILIES
from llama4_dist.gateway.metrics import GATEWAY_FAMILIES, PROCESS_NAMESPACE
from llama4_dist.gateway.observe.dispatch_families import DISPATCH_FAMILIES
from llama4_dist.gateway.observe.engine_families import ENGINE_FAMILIES
from llama4_dist.gateway.observe.family import Kind
from tests.scraping import Scrape

FAMILIES = (*GATEWAY_FAMILIES, *ENGINE_FAMILIES, *DISPATCH_FAMILIES, *CLUSTER_FAMILIES)
DECLARED = {family.name: family for family in FAMILIES}


def differences(found: Scrape) -> list[str]:
    """Return what is declared and not exported, exported and not declared, or another kind of thing."""
    exported = {
        name + ("_total" if family.type == "counter" else ""): family for name, family in found.families.items()
    }
    ours = {name for name in exported if not name.startswith(f"{PROCESS_NAMESPACE}_process_")}
    wrong = [f"{name} is declared only" for name in DECLARED.keys() - ours]
    wrong += [f"{name} is exported only" for name in ours - DECLARED.keys()]
    for name in ours & DECLARED.keys():
        declared, family = DECLARED[name], exported[name]
        if family.type != declared.kind or family.documentation != declared.meaning:
            wrong.append(f"{name}: {family.type} {family.documentation!r}")
        extra = {"le"} if declared.kind is Kind.HISTOGRAM else set()
        seen = {label for sample in family.samples for label in sample.labels} - extra
        if family.samples and seen != set(declared.labels):
            wrong.append(f"{name} has the labels {seen}")
    return wrong
