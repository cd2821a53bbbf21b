"""The chaos command on a real cluster: kills, stops and scaling under load, by its own judge; and nothing is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama4_dist.chaos.cases import answers_of, make_cases, prompts_of
from llama4_dist.chaos.history import EventKind, read_history
from llama4_dist.chaos.history.reference import Reference
from llama4_dist.chaos.history.verdict import Rules, judge
from tests.checkpoints import make_checkpoint
from tests.faults.leaks import assert_no_leaks, snapshot

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from llama4_dist.cli import main; main()", "chaos", "--json"]
BLOWS = ["--kill-every", "5s", "--stop-every", "9s", "--scale-every", "10s", "--kill-attention-every", "11s"]
SIZE = ["--experts", "3", "--hosts", "4,2", "--attention", "2", "--streams", "3", "--max-tokens", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """One run of half a minute, and its history; what it left behind fails here."""
    history = tmp_path_factory.mktemp("history") / "history.jsonl"
    before = snapshot()
    flags = ["--model", str(model), "--duration", "30s", "--seed", "3", "--history", str(history)]
    done = subprocess.run([*COMMAND, *flags, *BLOWS, *SIZE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert_no_leaks(before, grace_s=30.0)
    return json.loads(done.stdout), history


def test_nothing_is_lost_and_every_token_is_right(run: tuple[dict, Path]) -> None:
    verdict, _ = run
    assert verdict["passed"]
    assert verdict["ended_in_time"]
    assert verdict["kv_usage"] == 0.0, "the KV cache is not conserved"
    assert verdict["num_compared"] == sum(verdict["outcomes"].values()) >= 20
    assert verdict["outcomes"].keys() == {"finished"}


def test_it_really_struck_and_scaled(run: tuple[dict, Path]) -> None:
    verdict, history = run
    struck = {event.extra["name"] for event in read_history([history]) if event.kind is EventKind.FAULT_VERIFIED}
    assert {"kill_expert", "stop_expert", "kill_attention"} <= struck
    assert verdict["blows"] >= 6
    assert any(one["seconds"] is not None for one in verdict["operations"])


def test_the_judge_finds_one_wrong_token_in_it(run: tuple[dict, Path], model: Path) -> None:
    """A control: the same history is refused when a single expected token differs."""
    events = read_history([run[1]])
    cases = make_cases(prompts_of(model), max_tokens=32)
    reference = answers_of(model, cases, dtype="float32")
    assert judge(events, reference, Rules()).has_passed
    key, (tokens,) = next(iter(reference.tokens.items()))
    spoiled = (*tokens[:-1], (tokens[-1] + 1) % 300)
    assert not judge(events, Reference(tokens={**reference.tokens, key: (spoiled,)}), Rules()).has_passed


def test_a_history_is_never_written_over(run: tuple[dict, Path], model: Path) -> None:
    flags = ["--model", str(model), "--history", str(run[1])]
    done = subprocess.run([*COMMAND, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "name another file" in done.stdout
