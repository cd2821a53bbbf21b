"""Switches mechanisms off, one at a time, in a copy of the repository, and demands that their tests fail there.

A test that stays green without the mechanism it is said to test proves nothing. Does not know what a mechanism does.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("mechanisms.toml")
RUN_TIMEOUT_S = 900.0
TEST_TIMEOUT_S = 110
RED, GREEN, BROKEN, MISSING = "red", "GREEN", "BROKEN", "MISSING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """One entry of the table."""

    name: str
    rows: tuple[str, ...]
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one mechanism: `red` is as it should be, anything else a reason to look."""

    name: str
    rows: tuple[str, ...]
    colour: str
    tests: tuple[str, ...]
    details: str = ""


def main() -> int:
    """Run the table; 0 if every mechanism turned its tests red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="part of a name; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    mechanisms = [one for one in read_table(TABLE) if is_wanted(one, options.only)]
    if not mechanisms:
        parser.error(f"no mechanism is named like {options.only}: see {TABLE.name}")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="llama4-switched-off-") as folder:
        copy = copy_repository(Path(folder))
        console.print(f"{len(mechanisms)} mechanisms; first all of their tests with everything switched on")
        found = judge_untouched(copy, mechanisms)
        for number, mechanism in enumerate(mechanisms, 1):
            if mechanism.name not in found:
                found[mechanism.name] = switch_off(copy, mechanism)
            colour = found[mechanism.name].colour
            console.print(f"{number}/{len(mechanisms)} {mechanism.name}: {colour}", markup=False)
    outcomes = [found[mechanism.name] for mechanism in mechanisms]
    show(outcomes, as_json=options.json)
    return 0 if all(outcome.colour == RED for outcome in outcomes) else 1


def read_table(path: Path) -> list[Mechanism]:
    """Read the mechanisms; texts that begin with a line end were written as a block."""
    entries = tomllib.loads(path.read_text())["mechanism"]
    return [Mechanism(**entry | {"rows": tuple(entry["rows"]), "tests": tuple(entry["tests"])}) for entry in entries]


def is_wanted(mechanism: Mechanism, names: Sequence[str]) -> bool:
    return not names or any(name in mechanism.name or name in mechanism.rows for name in names)


def copy_repository(folder: Path) -> Path:
    """Copy what git knows or would know, as it stands in the working tree, with a repository around it."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return folder


def judge_untouched(copy: Path, mechanisms: Sequence[Mechanism]) -> dict[str, Outcome]:
    """Find mechanisms that cannot be judged: their tests fail anyway, or their text is not there exactly once."""
    found = {}
    tests = sorted({test for mechanism in mechanisms for test in mechanism.tests})
    failed = failures(copy, tests)
    for mechanism in mechanisms:
        red = [test for test in mechanism.tests if failed.get(test, True)]
        count = (copy / mechanism.file).read_text().count(mechanism.find)
        if red:
            found[mechanism.name] = outcome_of(mechanism, BROKEN, f"fails with the mechanism on: {', '.join(red)}")
        elif count != 1:
            found[mechanism.name] = outcome_of(mechanism, MISSING, f"{mechanism.file} holds the text {count} times")
    return found


def switch_off(copy: Path, mechanism: Mechanism) -> Outcome:
    """Replace the text, run the tests, put the text back."""
    path = copy / mechanism.file
    whole = path.read_text()
    try:
        path.write_text(whole.replace(mechanism.find, mechanism.replace))
        failed = failures(copy, mechanism.tests)
    finally:
        path.write_text(whole)
    green = [test for test in mechanism.tests if not failed.get(test, True)]
    return outcome_of(mechanism, GREEN if green else RED, f"still passes: {', '.join(green)}" if green else "")


def failures(copy: Path, tests: Sequence[str]) -> dict[str, bool]:
    """Run tests in the copy; tell of each that ran whether it, or one of its cases, failed."""
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    # No byte code: a file that is changed twice within a second would look unchanged to the cache.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", *tests, f"--junitxml={report}", "-o", f"timeout={TEST_TIMEOUT_S}"]
    try:
        subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=RUN_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {}
    if not report.exists():
        return {}  # a test hung until its process was ended
    seen: dict[str, bool] = defaultdict(bool)
    for case in ElementTree.parse(report).iter("testcase"):
        failed = any(case.find(kind) is not None for kind in ("failure", "error"))
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}"
        for test in tests:
            if name == test or name.startswith(f"{test}["):
                seen[test] |= failed
    return dict(seen)


def outcome_of(mechanism: Mechanism, colour: str, details: str) -> Outcome:
    return Outcome(name=mechanism.name, rows=mechanism.rows, colour=colour, tests=mechanism.tests, details=details)


def show(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """Print what came of it."""
    if as_json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
        return
    table = Table("mechanism", "rows", "tests", "switched off", Column("remark", overflow="fold"))
    for one in outcomes:
        colour = f"[red]{one.colour}[/]" if one.colour == RED else f"[bold green]{one.colour}[/]"
        table.add_row(one.name, " ".join(one.rows), str(len(one.tests)), colour, one.details)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
