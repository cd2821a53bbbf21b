"""The fit finds constants back, and slow minutes, loud neighbours and stored files do not change what it says."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.calibrate import LIMIT, read, report
from benchmarks.calibration.cases import ANCHOR, FITTED, PREDICTED, all_cases
from benchmarks.calibration.fit import START, fit, medians, predict, terms_of
from benchmarks.calibration.measure import Sample
from benchmarks.step_timer import STEP
from llama4_dist.planner.shared_cores import CoreMachine

TRUTH = replace(
    START, weight_s=1 / 20e9, expert_s=1 / 15e9, kv_s=1 / 30e9, flop_s=1 / 200e9, one_core=0.75, message_s=60e-6,
    step_s=300e-6, row_s=20e-6,
)  # fmt: skip


def samples(machine: CoreMachine = TRUTH, *, rounds: int = 5, noise: float = 0.02) -> list[Sample]:
    """Return what a machine with these constants would measure, in minutes that are up to twice as slow."""
    draw = random.Random(7)
    found = []
    for number in range(rounds):
        for case in all_cases(can_slice=False):
            minute, terms = draw.uniform(1.0, 2.0), terms_of(machine, case)
            shaky = [minute * draw.uniform(1 - noise, 1 + noise) for _ in range(4)]
            parts = {"attention": terms.attention_s * shaky[0], "expert": terms.networks_s * shaky[1]}
            step = {STEP: sum(parts.values()) + terms.rest_s * shaky[2]}
            if case.hosts == 0:
                step |= parts | dict.fromkeys(("route", "dispatch_wait", "combine"), 0.0)
            anchor_s = terms_of(machine, ANCHOR).step_s * shaky[3]
            found.append(Sample(case=case, round=number, terms=step, anchor_s=anchor_s, others=0.01))
    return found


def test_layouts_that_were_not_fitted_are_predicted() -> None:
    measured = medians(samples())
    machine = fit([one for one in measured if one.case.fitted])
    predicted = predict(machine, [one for one in measured if not one.case.fitted])
    assert len(predicted) == len(PREDICTED)
    assert max(abs(one.error) for one in predicted) < 0.06


def test_a_wrong_structure_is_found_out() -> None:
    """A machine whose context costs nothing in what is fitted but much elsewhere cannot be predicted."""
    spoilt = [
        replace(sample, terms={name: 2 * value for name, value in sample.terms.items()})
        if sample.case.context > 4096
        else sample
        for sample in samples()
    ]
    measured = medians(spoilt)
    machine = fit([one for one in measured if one.case.fitted])
    far = [one for one in predict(machine, measured) if abs(one.error) > LIMIT]
    assert [one.measured.case.context for one in far] == [8000]


def test_loud_samples_count_only_where_there_is_no_quiet_one() -> None:
    case = PREDICTED[0]
    quiet = Sample(case=case, round=0, terms={STEP: 1.0}, anchor_s=1.0, others=0.0)
    loud = Sample(case=case, round=1, terms={STEP: 9.0}, anchor_s=1.0, others=0.5)
    (found,) = medians([quiet, loud, loud])
    assert (found.terms[STEP], found.num_samples) == (1.0, 1)
    (found,) = medians([loud])
    assert (found.terms[STEP], found.num_samples, found.others) == (9.0, 0, 0.5)


def test_slow_minutes_cancel() -> None:
    case = PREDICTED[0]
    slow = [Sample(case=case, round=n, terms={STEP: 2.0 * n}, anchor_s=1.0 * n, others=0.0) for n in (1, 2, 3)]
    (found,) = medians(slow)
    assert found.terms[STEP] == pytest.approx(4.0)  # twice the median anchor


def test_stored_samples_are_read_back_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "samples.json"
    kept = samples(rounds=2)
    file.write_text(json.dumps({"samples": [sample.document() for sample in kept]}))
    assert read([file]) == kept
    assert report(read([file])) == 0
    assert f"{len(PREDICTED)} of {len(PREDICTED)} within 15%" in capsys.readouterr().out


def test_a_loud_machine_proves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert report([replace(sample, others=0.6) for sample in samples(rounds=1)]) == 2
    assert "prove nothing" in capsys.readouterr().out


def test_predictions_far_off_are_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    spoilt = [
        sample
        if sample.case.fitted
        else replace(sample, terms={name: 1.5 * value for name, value in sample.terms.items()})
        for sample in samples(rounds=1)
    ]
    assert report(spoilt) == 1
    assert "0 of" in capsys.readouterr().out


def test_no_predicted_layout_was_fitted() -> None:
    assert not set(FITTED) & set(PREDICTED)
    assert len(PREDICTED) >= 12
