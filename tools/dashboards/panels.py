"""Panels, rows and dashboards as Grafana's JSON; knows no metric."""

from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 39
GRID_WIDTH = 24
PANEL_HEIGHT = 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture. `lines` maps a legend to a query; `unit` is Grafana's name of it."""

    title: str
    meaning: str
    lines: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    floor: float | None = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels side by side under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One page."""

    name: str
    title: str
    meaning: str
    rows: tuple[Row, ...]

    def json(self) -> dict[str, Any]:
        """Return the page as Grafana reads it."""
        return {
            "uid": f"llama4-dist-{self.name}",
            "title": self.title,
            "description": self.meaning,
            "tags": ["llama4_dist"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "time": {"from": "now-1h", "to": "now"},
            "refresh": "30s",
            "templating": {"list": variables()},
            "links": [{"type": "dashboards", "tags": ["llama4_dist"], "title": "llama4_dist", "asDropdown": True}],
            "panels": panels_of(self.rows),
        }


def variables() -> list[dict[str, Any]]:
    """Return what a reader chooses: the data source, and which deployment."""
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "job",
            "label": "Deployment",
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": "label_values(llama4_dist_build_info, job)", "refId": "job"},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def panels_of(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Lay rows out below each other and number everything."""
    found: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        found.append(heading(row.title, y))
        width = GRID_WIDTH // len(row.panels)
        found += [picture(panel, x=width * place, y=y + 1, width=width) for place, panel in enumerate(row.panels)]
        y += 1 + PANEL_HEIGHT
    return [{"id": place + 1, **panel} for place, panel in enumerate(found)]


def heading(title: str, y: int) -> dict[str, Any]:
    """Return a row's heading."""
    return {
        "type": "row",
        "title": title,
        "collapsed": False,
        "panels": [],
        "gridPos": {"x": 0, "y": y, "w": GRID_WIDTH, "h": 1},
    }


def picture(panel: Panel, *, x: int, y: int, width: int) -> dict[str, Any]:
    """Return one panel."""
    defaults: dict[str, Any] = {"unit": panel.unit, "custom": {}}
    if panel.floor is not None:
        defaults["min"] = panel.floor
    if panel.kind == "timeseries":
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.meaning,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": PANEL_HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options(panel.kind),
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            for place, (legend, expr) in enumerate(panel.lines.items())
        ],
    }


def options(kind: str) -> dict[str, Any]:
    """Return what a kind of panel needs besides its lines."""
    if kind == "timeseries":
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
