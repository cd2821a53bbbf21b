"""Dashboards and alarms: every query parses and names what is exported, every page is one that Grafana takes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from cluster.observe.families import CLUSTER_FAMILIES
from llama4_dist.gateway.metrics import GATEWAY_FAMILIES
from llama4_dist.gateway.observe.dispatch_families import DISPATCH_FAMILIES
from llama4_dist.gateway.observe.engine_families import ENGINE_FAMILIES
from llama4_dist.gateway.observe.family import Family, Kind
from tools import metrics_table
from tools.dashboards import __main__ as dashboards

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
FAMILIES = (*GATEWAY_FAMILIES, *ENGINE_FAMILIES, *DISPATCH_FAMILIES, *CLUSTER_FAMILIES)
OF_THE_SCRAPE = {"job", "instance"}  # labels that Prometheus adds


def series_of(family: Family) -> dict[str, set[str]]:
    """The names a family has in Prometheus, and their labels."""
    labels = {*family.labels, *OF_THE_SCRAPE}
    if family.kind is not Kind.HISTOGRAM:
        return {family.name: labels}
    return {
        f"{family.name}_bucket": labels | {"le"},
        f"{family.name}_sum": labels,
        f"{family.name}_count": labels,
    }


SERIES = {name: labels for family in FAMILIES for name, labels in series_of(family).items()}


def complaints(query: str) -> list[str]:
    """What a query names that is not exported."""
    found: list[str] = []
    labels_of(promql_parser.parse(query.replace("$__rate_interval", "5m")), found)
    return found


def labels_of(node: Any, found: list[str]) -> set[str]:
    """Walk an expression; return the labels its result can have."""
    kind = type(node).__name__
    if kind == "VectorSelector":
        known = SERIES.get(node.name)
        if known is None:
            found.append(f"{node.name} is not exported")
            return set()
        found += [f"{node.name} has no label {one.name}" for one in node.matchers.matchers if one.name not in known]
        return known
    if kind == "MatrixSelector":
        return labels_of(node.vector_selector, found)
    if kind == "AggregateExpr":
        inside = labels_of(node.expr, found)
        by = set(node.modifier.labels) if node.modifier is not None else set()
        found += [f"by ({label}) of an expression without it" for label in by - inside]
        return inside if node.param is not None else by
    if kind == "Call":
        return set().union(*(labels_of(argument, found) for argument in node.args))
    if kind == "BinaryExpr":
        left, right = labels_of(node.lhs, found), labels_of(node.rhs, found)
        return left or right
    if kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        return labels_of(node.expr, found)
    assert kind in ("NumberLiteral", "StringLiteral"), f"{kind} is not looked into"
    return set()


def targets(page: Any) -> Iterator[tuple[str, Any]]:
    for panel in page["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_names_what_is_exported(path: Path) -> None:
    page = json.loads(path.read_text())
    wrong = {title: bad for title, target in targets(page) if (bad := complaints(target["expr"]))}
    assert not wrong
    for title, target in targets(page):
        query = promql_parser.parse(target["expr"].replace("$__rate_interval", "5m"))
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert shown <= labels_of(query, []), f"{title}: the legend shows {shown}"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_every_alarm_parses_names_what_is_exported_and_is_explained(rule: dict[str, Any]) -> None:
    assert not complaints(rule["expr"])
    told = rule["annotations"]
    assert {"summary", "meaning", "remedy", "runbook_url"} <= told.keys()
    page, _, anchor = told["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert rule["alert"] in headings
    assert anchor == rule["alert"].lower()
    used = set(re.findall(r"\$labels\.(\w+)", told["summary"]))
    assert used <= labels_of(promql_parser.parse(rule["expr"]), [])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_every_explained_alarm_exists_once() -> None:
    names = [rule["alert"] for rule in rules()]
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / "alarms.md").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(headings)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_dashboard_is_one_that_grafana_takes(path: Path) -> None:
    page = json.loads(path.read_text())
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", page["uid"])
    assert page["schemaVersion"] >= 36
    assert page["title"]
    variables = {one["name"]: one for one in page["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    ids = [panel["id"] for panel in page["panels"]]
    assert len(ids) == len(set(ids))
    for title, target in targets(page):
        assert target["datasource"]["uid"] == "${datasource}", title
    taken: set[tuple[int, int]] = set()
    for panel in page["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["targets"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_uids_and_titles_differ() -> None:
    pages = [json.loads(path.read_text()) for path in PAGES]
    assert len({page["uid"] for page in pages}) == len({page["title"] for page in pages}) == len(pages) == 4


def test_the_files_are_what_is_described() -> None:
    assert dashboards.main(["--check"]) == 0


def test_the_table_of_the_docs_is_what_is_declared() -> None:
    text = metrics_table.PAGE.read_text()
    assert metrics_table.page(text) == text, "run python -m tools.metrics_table"
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("sum(rate(llama4_dist_no_such_total[5m]))", "not exported"),
        ('llama4_dist_worker_up{host="x"}', "no label host"),
        ("sum by (layer) (llama4_dist_worker_up)", r"by \(layer\)"),
        ("sum by (worker) (sum by (role) (llama4_dist_worker_up))", r"by \(worker\)"),
        ("histogram_quantile(0.9, rate(llama4_dist_station_seconds[5m]))", "not exported"),
    ],
)
def test_the_lint_finds_what_is_wrong(query: str, complaint: str) -> None:
    assert any(re.search(complaint, one) for one in complaints(query))
