"""`tools/gpu_check.py` itself: its checks pass in the interpreter, and on a card where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *flags: str, **environment: str) -> list[dict[str, object]]:
    out = tmp_path / "out.json"
    command: list[str | Path] = [sys.executable, ROOT / "tools" / "gpu_check.py", "--json", out, *flags]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return list(json.loads(out.read_text())["rows"])


@pytest.mark.parametrize(
    ("check", "num_rows"),
    [("small", 16), ("rows", 17), ("attention", 6), ("quantized", 13), ("model", 1), ("model-bits", 3), ("hosts", 5)],
)
def test_every_check_passes_in_the_interpreter(tmp_path: Path, check: str, num_rows: int) -> None:
    rows = run(tmp_path, "--quick", "--device", "cpu", "--only", check, TRITON_INTERPRET="1")
    assert [row for row in rows if row["verdict"] != "ok"] == []
    assert len(rows) == num_rows


@pytest.mark.gpu
def test_every_check_passes_on_the_card(tmp_path: Path) -> None:
    assert "FAIL" not in {row["verdict"] for row in run(tmp_path, "--quick", TRITON_INTERPRET="0")}
