"""What the Makefile's recipes name is there: most of them CI does not run."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHONY = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
FOLDERS = ("benchmarks", "deploy", "models", "tests", "tools")


@pytest.mark.parametrize("target", PHONY[1].split() if PHONY else [])
def test_every_path_of_a_recipe_exists(target: str) -> None:
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = re.findall(r"[^\s'\"]+", shown)
    paths = [word for word in words if word.split("/")[0] in FOLDERS]
    assert [path for path in paths if not list(ROOT.glob(path))] == []


def test_there_are_targets() -> None:
    assert PHONY is not None
    assert {"test", "check", "deploy-check", "switch-off"} <= set(PHONY[1].split())
