"""Grafana's dashboards, described in Python and written as JSON: `python -m tools.dashboards`."""
