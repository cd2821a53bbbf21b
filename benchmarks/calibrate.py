"""Measure small models on this machine, fit the planner's constants on some layouts, and predict the others.

Real engines decode: in one process, and on Ray clusters of this machine. Every measurement stands between two of the
same anchor and is told in its time; rounds take turns and medians count (`benchmarks.calibration`). Raw samples are
written as they come, so that a fit can be repeated without measuring (`--from`). Acceptance: every layout that was not
fitted is predicted within 15 %.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.calibration.cases import all_cases
from benchmarks.calibration.fit import Prediction, as_document, constants, fit, medians, predict
from benchmarks.calibration.measure import Sample, can_slice, measure
from benchmarks.checkpoint import commit
from benchmarks.quiet import MAX_SHARE
from benchmarks.step_timer import STEP
from llama4_dist.planner.shared_cores import CoreMachine

LIMIT = 0.15
ENOUGH = 12  # predicted layouts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=9, help="timed in each round; their median counts")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--samples", type=Path, default=Path("calibration.json"), help="where raw samples are kept")
    parser.add_argument("--from", dest="source", type=Path, nargs="+", help="fit these samples; measure nothing")
    arguments = parser.parse_args()
    samples = read(arguments.source) if arguments.source else run(arguments)
    return report(samples)


def run(arguments: argparse.Namespace) -> list[Sample]:
    """Measure, writing the samples down after each."""
    cases = [case for case in all_cases(can_slice=can_slice()) if arguments.only in case.name]
    samples: list[Sample] = []
    console, at = Console(stderr=True), datetime.now(UTC).isoformat(timespec="seconds")

    def keep(sample: Sample) -> None:
        samples.append(sample)
        done = f"{len(samples)}/{len(cases) * arguments.rounds}"
        console.print(f"{done} {sample.case.name}: {1e3 * sample.terms[STEP]:.2f} ms, others {sample.others:.0%}")
        document = {"benchmark": "calibrate", "at": at, "commit": commit(), "samples": [s.document() for s in samples]}
        arguments.samples.write_text(json.dumps(document) + "\n")

    with tempfile.TemporaryDirectory(prefix="llama4-calibrate-") as folder:
        measure(cases, Path(folder), rounds=arguments.rounds, num_steps=arguments.steps, on_sample=keep)
    return samples


def read(files: Sequence[Path]) -> list[Sample]:
    """Read samples that were kept; those of several runs count together."""
    return [Sample.read(sample) for file in files for sample in json.loads(file.read_text())["samples"]]


def report(samples: Sequence[Sample]) -> int:
    """Fit, predict, print; 1 where a prediction is off by more than the limit, 2 where too little was quiet."""
    measured = medians(samples)
    fitted, others = [m for m in measured if m.case.fitted], [m for m in measured if not m.case.fitted]
    if not fitted:
        sys.exit("no fitted case was measured: run without --only")
    machine = fit(fitted)
    show_constants(machine)
    show("fitted", predict(machine, fitted))
    predicted = predict(machine, others)
    show("predicted, never fitted", predicted)
    far = [one for one in predicted if abs(one.error) > LIMIT]
    loud = [one for one in predicted if one.measured.num_samples == 0]
    within = f"{len(predicted) - len(far)} of {len(predicted)} within {LIMIT:.0%}"
    print(f"{within}; {len(loud)} had no quiet sample (others above {MAX_SHARE:.0%}) and prove nothing")
    print(json.dumps({"machine": as_document(machine)}))
    if len(predicted) - len(loud) < ENOUGH:
        return 2
    return 1 if far else 0


def show_constants(machine: CoreMachine) -> None:
    table = Table(title="constants of this machine")
    for name in constants(machine):
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3g}" for value in constants(machine).values()))
    Console(width=160).print(table)


def show(title: str, predictions: Sequence[Prediction]) -> None:
    table = Table("layout", "measured ms", "computed ms", "error", "quiet", "others", title=title)
    for one in predictions:
        colour = "red" if abs(one.error) > LIMIT else "green"
        table.add_row(
            one.measured.case.name,
            f"{1e3 * one.measured.terms[STEP]:.2f}",
            f"{1e3 * one.predicted_s:.2f}",
            f"[{colour}]{one.error:+.1%}[/]",
            str(one.measured.num_samples),
            f"{one.measured.others:.0%}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
