"""Writes deploy/grafana/*.json; with --check only says whether the files are what the description makes."""

import json
import sys
from pathlib import Path

from tools.dashboards.boards import BOARDS

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"


def written() -> dict[Path, str]:
    """Return what belongs in each file."""
    return {FOLDER / f"{board.name}.json": json.dumps(board.json(), indent=1) + "\n" for board in BOARDS}


def main(arguments: list[str]) -> int:
    """Write, or compare."""
    files = written()
    if "--check" not in arguments:
        for path, text in files.items():
            path.write_text(text)
        return 0
    stale = [path.name for path, text in files.items() if not path.exists() or path.read_text() != text]
    if stale:
        print(f"{', '.join(stale)}: not what tools/dashboards describes; run python -m tools.dashboards")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
