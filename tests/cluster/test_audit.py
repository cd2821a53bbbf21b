"""No byte from a socket or a file becomes code while a cluster serves, changes and loses a host."""

import json
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]


def run_audited(tmp_path: Path, *flags: str) -> list[str]:
    """What the audit hook saw."""
    model = make_checkpoint(tmp_path / "model", "scout")
    command = [sys.executable, "-m", "tests.cluster.audited", str(model), str(tmp_path / "run"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_nothing_is_unpickled_or_executed_while_a_cluster_serves_changes_and_loses_a_host(tmp_path: Path) -> None:
    assert run_audited(tmp_path) == []


def test_the_hook_sees_code_that_is_executed(tmp_path: Path) -> None:
    assert any("exec" in event for event in run_audited(tmp_path, "--prove"))
