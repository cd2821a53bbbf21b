"""Fits the machine's constants to measured steps, and predicts others; plain arithmetic on stored samples.

All times are relative to the anchor's, measured in the same round, so that a slow minute of the machine cancels. A
disturbed sample counts only where a case has no quiet one. The constants are found by Gauss-Newton on their logarithms
(so that none is negative), on relative errors, with a weak pull towards the starting values that decides what the
samples leave open.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from benchmarks.calibration.cases import BASE, CORES, MODELS, Case
from benchmarks.calibration.measure import Sample, Terms
from benchmarks.quiet import MAX_SHARE
from benchmarks.step_timer import STEP
from llama4_dist.checkpoint.presets import preset
from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.shared_cores import CoreLayout, CoreMachine, CoreTerms, core_step

# Where the search begins: round figures of a current server core, of which no result depends by more than PULL.
START = CoreMachine(
    weight_s=1 / 28e9,
    expert_s=1 / 25e9,
    kv_s=1 / 20e9,
    flop_s=1 / 300e9,
    row_s=10e-6,
    layer_s=50e-6,
    sequence_s=10e-6,
    step_s=150e-6,
    one_core=0.6,
    message_s=30e-6,
    wire_s=1 / 2e9,
    stream_s=300e-6,
)
PULL = 0.03  # weight of one logarithmic unit away from START against a relative error of 1
ROUNDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A case's medians over its rounds, in seconds of an anchor of `anchor_s`."""

    case: Case
    terms: Terms
    num_samples: int
    others: float  # the most that others had in any sample that counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A case, what was measured and what the fitted formulae say; seconds."""

    measured: Measured
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured.terms[STEP] - 1.0


def medians(samples: Iterable[Sample]) -> list[Measured]:
    """Return each case's quiet medians, scaled to the median anchor."""
    samples = list(samples)
    quiet_anchors = [sample.anchor_s for sample in samples if sample.others <= MAX_SHARE]
    anchor_s = statistics.median(quiet_anchors or [sample.anchor_s for sample in samples])
    by_case: dict[Case, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_case[sample.case].append(sample)
    return [_median(case, of_case, anchor_s) for case, of_case in by_case.items()]


def _median(case: Case, samples: Sequence[Sample], anchor_s: float) -> Measured:
    quiet = [sample for sample in samples if sample.others <= MAX_SHARE]
    counted = quiet or sorted(samples, key=lambda sample: sample.others)[:1]
    return Measured(
        case=case,
        terms={
            name: statistics.median(sample.terms[name] * anchor_s / sample.anchor_s for sample in counted)
            for name in counted[0].terms
        },
        num_samples=len(quiet),
        others=max(sample.others for sample in counted),
    )


def fit(measured: Sequence[Measured]) -> CoreMachine:
    """Return the constants that make the fitted cases' terms come out best; at most `cores` shares reach 1."""
    start = np.log(np.array([getattr(START, field.name) for field in fields(CoreMachine)]))
    found = start.copy()
    for _ in range(ROUNDS):
        errors = _errors(measured, found, start)
        slopes = np.stack(
            [(_errors(measured, found + step, start) - errors) / 1e-4 for step in 1e-4 * np.eye(len(found))]
        )
        change = np.linalg.lstsq(slopes.T, -errors, rcond=None)[0]
        found = found + np.clip(change, -0.5, 0.5)
        if np.abs(change).max() < 1e-6:
            break
    return _machine(found)


def predict(machine: CoreMachine, measured: Iterable[Measured]) -> list[Prediction]:
    """Return what the constants say of each case."""
    return [Prediction(measured=one, predicted_s=terms_of(machine, one.case).step_s) for one in measured]


def terms_of(machine: CoreMachine, case: Case) -> CoreTerms:
    """Return the planner's terms of a case."""
    layout = CoreLayout(
        cores=CORES,
        rows=case.batch,
        context=case.context,
        hosts=case.hosts,
        slices=case.slices,
        attention_threads=case.attention_threads,
    )
    return core_step(geometry(case.model), machine, layout)


def geometry(model: str) -> Geometry:
    """Return the geometry of a measured model: Scout's constants with small widths."""
    sizes = BASE | MODELS[model]
    num_layers = sizes["num_hidden_layers"]
    config = preset("scout")
    return Geometry(
        config=replace(
            config,
            dtype="float32",
            hidden_size=sizes["hidden_size"],
            num_layers=num_layers,
            num_heads=sizes["num_attention_heads"],
            num_kv_heads=sizes["num_key_value_heads"],
            head_dim=sizes["head_dim"],
            expert_width=sizes["intermediate_size"],
            dense_width=sizes["intermediate_size_mlp"],
            num_experts=sizes["num_local_experts"],
            vocab_size=sizes["vocab_size"],
            rope_layers=config.rope_layers[:num_layers],
            chunked_layers=config.chunked_layers[:num_layers],
            moe_layers=config.moe_layers[:num_layers],
        )
    )


def constants(machine: CoreMachine) -> Mapping[str, float]:
    """Return the constants in units that people know."""
    return {
        "weights GB/s": 1e-9 / machine.weight_s,
        "experts GB/s": 1e-9 / machine.expert_s,
        "keys GB/s": 1e-9 / machine.kv_s,
        "GFLOP/s": 1e-9 / machine.flop_s,
        "row and layer us": 1e6 * machine.row_s,
        "layer us": 1e6 * machine.layer_s,
        "sequence us": 1e6 * machine.sequence_s,
        "step us": 1e6 * machine.step_s,
        "one core": machine.one_core,
        "message us": 1e6 * machine.message_s,
        "wire GB/s": 1e-9 / machine.wire_s,
        "stream us": 1e6 * machine.stream_s,
    }


def _errors(measured: Sequence[Measured], logs: np.ndarray, start: np.ndarray) -> np.ndarray:
    machine = _machine(logs)
    errors: list[float] = []
    for one in measured:
        terms, step_s = terms_of(machine, one.case), one.terms[STEP]
        errors.append(terms.step_s / step_s - 1.0)
        if len(one.terms) > 1:  # stations are known: each part's error counts as a share of the step
            attention_s, networks_s = one.terms["attention"], _networks_s(one.terms)
            errors.append((terms.attention_s - attention_s) / step_s)
            errors.append((terms.networks_s - networks_s) / step_s)
    return np.concatenate([np.array(errors), PULL * (logs - start)])


def _networks_s(terms: Terms) -> float:
    return sum(terms[name] for name in ("route", "expert", "dispatch_wait", "combine"))


def _machine(logs: np.ndarray) -> CoreMachine:
    values = {field.name: math.exp(value) for field, value in zip(fields(CoreMachine), logs, strict=True)}
    values["one_core"] = min(1.0, max(1.0 / CORES, values["one_core"]))
    return CoreMachine(**values)


def as_document(machine: CoreMachine) -> dict[str, float]:
    return asdict(machine)
