"""The simulation as a command: runs seeds in a process of its own, whose sets of names have the same order every time.

`python -m tests.simulation.run seeds 0 2500`, `… seed 17`, `… wrong 0 100`, `… tight 0 100`, `… late 0 100`,
`… controls 1500`: one JSON object on the last line. PYTHONHASHSEED must be 0, or a seed is another schedule next time.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from tests.simulation.controls import OFF, without
from tests.simulation.schedule import Outcome, run_seed, run_wrong_seed

MOST_FAILURES = 3  # whose traces are told
RUNS: dict[str, Callable[[int], Outcome]] = {
    "seeds": run_seed,
    "tight": partial(run_seed, variant="tight"),
    "late": partial(run_seed, variant="late"),
    "wrong": run_wrong_seed,
}

# Seeds that fail without a mechanism, to look at first; the code under test changes, and then others may.
LIKELY = {
    "hedging": (16, 17),
    "late replies dropped": (113, 265),
    "refusals": (49, 621),
    "strayed experts": (49, 86),
    "epoch check": (238, 1, 12),
    "catching up": (869, 897),
    "dialling again": (46, 50),
}
NOTICED_IN = {"cross-check": "wrong", "epoch check": "late"}  # the others in schedules of the usual kind


def run_many(run: Callable[[int], Outcome], first: int, count: int) -> dict[str, object]:
    """Run seeds; say how they ended, with the traces of the first that failed."""
    kills, happened = Counter[str](), Counter[str]()
    digest, failures = hashlib.sha256(), []
    for seed in range(first, first + count):
        outcome = run(seed)
        kills += outcome.kills
        happened += outcome.happened
        digest.update("\n".join(outcome.trace).encode())
        if outcome.breaches:
            failures.append({"seed": seed, "breaches": outcome.breaches, "trace": outcome.trace})
    return {
        "num_failures": len(failures),
        "seeds": [failure["seed"] for failure in failures],
        "failures": failures[:MOST_FAILURES],
        "kills": kills,
        "happened": happened,
        "digest": digest.hexdigest(),
    }


def run_controls(most: int) -> dict[str, object]:
    """Turn each mechanism off and look for a seed that notices; None where there is none among the first `most`."""
    return {mechanism: _noticed_by(mechanism, most) for mechanism in OFF}


def _noticed_by(mechanism: str, most: int) -> tuple[int, str] | None:
    run = RUNS[NOTICED_IN.get(mechanism, "seeds")]
    for seed in (*LIKELY.get(mechanism, ()), *range(most)):
        with without(mechanism):
            outcome = run(seed)
        if outcome.breaches and not run(seed).breaches:
            return seed, outcome.breaches[0]
    return None


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    command, *numbers = arguments
    first, *rest = map(int, numbers)
    if command == "controls":
        result = run_controls(first)
    elif command == "seed":
        outcome = run_seed(first, logs=True)
        print("\n".join(outcome.trace))
        result = {"num_failures": len(outcome.breaches), "breaches": outcome.breaches}
    else:
        result = run_many(RUNS[command], first, rest[0])
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
