"""PromQL over declared families, so that no query can name what is not exported; knows no panel.

Every gateway of a cluster exports its engines, so a worker's series may come several times: the largest is taken.
"""

from collections.abc import Callable
from typing import Any

from llama4_dist.gateway.metrics import GATEWAY_FAMILIES
from llama4_dist.gateway.observe.family import Family, Kind

WINDOW = "$__rate_interval"
OF_THE_JOB = 'job=~"$job"'


def series(family: Family, where: str = "", suffix: str = "") -> str:
    """Return the selector of a family, `where` being more matchers; `suffix` chooses a series of a histogram."""
    matchers = ", ".join(filter(None, (OF_THE_JOB, where)))
    return f"{family.name}{suffix}{{{matchers}}}"


def rate(family: Family, *by: str, where: str = "", suffix: str = "") -> str:
    """Return what a counter grows by in a second, summed but for the labels `by`."""
    return summed(family, f"rate({series(family, where, suffix)}[{WINDOW}])", by)


def mean_rate(family: Family, *by: str) -> str:
    """Return what a counter grows by in a second, mean over the series that are alike in the labels `by`."""
    return f"avg{group(by)} ({once(family, f'rate({series(family)}[{WINDOW}])')})"


def now(family: Family, *by: str, where: str = "") -> str:
    """Return a gauge as it is, summed but for the labels `by`."""
    return summed(family, series(family, where), by)


def worst(family: Family, *by: str, where: str = "", least: bool = False) -> str:
    """Return the largest, or least, of a gauge."""
    return f"{'min' if least else 'max'}{group(by)} ({series(family, where)})"


def quantile(share: float, family: Family, *by: str, where: str = "") -> str:
    """Return a quantile of a histogram."""
    assert family.kind is Kind.HISTOGRAM, family.name
    return f"histogram_quantile({share}, {rate(family, 'le', *by, where=where, suffix='_bucket')})"


def percentiles(family: Family, *by: str, where: str = "") -> dict[str, str]:
    """Return the usual three quantiles by their names."""
    return {f"p{round(100 * one)}": quantile(one, family, *by, where=where) for one in (0.5, 0.95, 0.99)}


def mean(family: Family, *by: str, where: str = "") -> str:
    """Return the mean of a histogram's values."""
    parts = (rate(family, *by, where=where, suffix=suffix) for suffix in ("_sum", "_count"))
    return " / ".join(parts)


def each(query: Callable[..., str], family: Family, *by: str, **options: Any) -> dict[str, str]:
    """Return a panel's lines where there is one for each value of the labels `by`, called by that value."""
    return {" ".join(f"{{{{{label}}}}}" for label in by): query(family, *by, **options)}


def share(part: str, whole: str) -> str:
    """Divide; where there is nothing of the whole, there is no share."""
    return f"({part}) / (({whole}) > 0)"


def summed(family: Family, inner: str, by: tuple[str, ...]) -> str:
    """Sum over series, each worker counted once however many gateways tell of it."""
    return f"sum{group(by)} ({once(family, inner, 'le' in by)})"


def once(family: Family, inner: str, is_bucket: bool = False) -> str:
    """Return each series once, however many gateways tell of it."""
    if family in GATEWAY_FAMILIES or not family.labels:
        return inner
    return f"max{group(('job', *family.labels, *(('le',) if is_bucket else ())))} ({inner})"


def group(labels: tuple[str, ...]) -> str:
    """Write a grouping clause."""
    return f" by ({', '.join(labels)})" if labels else ""
