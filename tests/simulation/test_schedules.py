"""Thousands of seeded schedules of kills, stops and changes: tokens, epochs, ownership and KV stay right in all.

LLAMA4_SIM_SEED=17 replays one with its trace and the logs (add `-s`); LLAMA4_SIM_SEEDS=20000 runs that many.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.controls import OFF

ROOT = Path(__file__).parents[2]
NUM_SEEDS = int(os.environ.get("LLAMA4_SIM_SEEDS", "2500"))
NUM_QUICK = 150
PHASES = (
    *("idle", "receiving", "computing", "reply posted", "adopting", "scale-up", "drain", "repair"),
    *("before the first request", "controller dead"),
)
EVENTS = (
    *("hedged rows", "late replies", "compared answers", "preemptions", "refused: WRONG_OWNER"),
    *("lost: LINK_DOWN", "lost: REPLY_TIMEOUT", "call:publish", "call:keep", "call:restore", "call:topology"),
)


def simulate(*arguments: str | int) -> Any:
    """Run the command; its last line."""
    return json.loads(run_command(*arguments).splitlines()[-1])


def run_command(*arguments: str | int) -> str:
    command = [sys.executable, "-m", "tests.simulation.run", *map(str, arguments)]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(result: Any) -> None:
    for failure in result["failures"]:
        text = "\n".join([*failure["breaches"], *failure["trace"]])
        pytest.fail(
            f"seed {failure['seed']} of {result['seeds']}: LLAMA4_SIM_SEED={failure['seed']} replays it\n{text}"
        )


@cache
def noticed() -> Any:
    return simulate("controls", 1500)


@pytest.mark.skipif("LLAMA4_SIM_SEED" not in os.environ, reason="LLAMA4_SIM_SEED names no seed")
def test_one_seed_replayed() -> None:
    told = run_command("seed", os.environ["LLAMA4_SIM_SEED"])
    print(told)
    assert not json.loads(told.splitlines()[-1])["num_failures"], told


@pytest.mark.timeout(300)
def test_a_few_schedules_end_well() -> None:
    check(simulate("seeds", 0, NUM_QUICK))


@pytest.mark.timeout(300)
def test_what_a_search_interleaves_ends_well() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/simulation/test_machine.py"]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_schedule_loses_a_request_or_changes_a_token() -> None:
    result = simulate("seeds", 0, NUM_SEEDS)
    kills = result["kills"]
    print(f"{kills['all']} kills in {NUM_SEEDS} schedules: {kills}")
    check(result)
    assert kills["all"] >= min(1000, NUM_SEEDS), kills
    assert not [phase for phase in PHASES if not kills.get(phase)], kills
    assert not [event for event in EVENTS if not result["happened"].get(event)], result["happened"]


@pytest.mark.timeout(300)
def test_a_host_that_computes_wrong_answers_is_found_and_no_other() -> None:
    check(simulate("wrong", 0, 100))


@pytest.mark.xfail(reason="a plan lets full hosts gain experts before they lose others, so its loading never succeeds")
@pytest.mark.timeout(300)
def test_a_cluster_whose_memory_is_nearly_full_is_repaired() -> None:
    check(simulate("tight", 0, 60))


def test_an_epoch_of_a_dead_controller_that_arrives_late_does_no_harm() -> None:
    check(simulate("late", 0, 60))


@pytest.mark.timeout(300)
def test_a_seed_is_the_same_schedule_every_time() -> None:
    first, again = (simulate("seeds", 0, NUM_QUICK)["digest"] for _ in range(2))
    assert first == again
    assert simulate("seeds", 40, 40)["digest"] != first


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mechanism", OFF)
def test_some_schedule_fails_without(mechanism: str) -> None:
    assert noticed()[mechanism] is not None, f"no schedule needs {mechanism}"
