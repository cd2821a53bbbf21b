"""Flags that several commands share, and how their values are read; nothing heavy is imported here."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class DtypeChoice(StrEnum):
    """Compute dtype; auto is the checkpoint's own."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class WeightsChoice(StrEnum):
    """Format of linear weights."""

    STORED = "stored"
    INT8 = "int8"


def parse_seconds(given: str) -> float:
    """Read `1s`, `500ms`, `5m` or a number of seconds; a ValueError becomes the flag's own error."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?", str(given).strip())
    if found is None:
        raise typer.BadParameter(f"{given!r} is no time: give e.g. 1s, 500ms, 5m or 2.5")
    return float(found[1]) * SECONDS[found[2] or "s"]


def parse_bytes(given: str) -> int:
    """Read `2GB`, `512MiB` or a number of bytes; a ValueError becomes the flag's own error."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kMGT])(i?)B?|B)?", str(given).strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"{given!r} is no size: give e.g. 2GB, 512MiB or 1000000000")
    power = " KMGT".index((found[2] or " ").upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document (streams: one per line).")]
Token = Annotated[str | None, typer.Option("--token", envvar="LLAMA4_DIST_TOKEN", help="Bearer token of the server.")]
TlsCa = Annotated[Path | None, typer.Option("--tls-ca", help="CA file; switches TLS on.")]
ExpertMemory = Annotated[
    int | None,
    typer.Option(
        "--expert-memory",
        parser=parse_bytes,
        metavar="SIZE",
        help="Expert weights that stay in memory, of each host; others are read on demand. E.g. 2GB.",
    ),
]
AdminAddress = Annotated[str, typer.Option("--server", "-s", help="host:port of the cluster's admin server.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan and check; change nothing.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return as soon as the operation has begun.")]
RequestId = Annotated[str, typer.Option(help="Makes a repeated command find the operation of the first.")]
DrainTimeout = Annotated[
    float | None, typer.Option(parser=parse_seconds, metavar="TIME", help="Longest wait for rows in flight [120s].")
]
