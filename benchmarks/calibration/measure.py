"""Runs cases on the real engine and times their decode steps, each between two runs of the anchor."""

import inspect
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.calibration.cases import ANCHOR, BASE, CORES, MODELS, Case
from benchmarks.checkpoint import write_checkpoint
from benchmarks.engine_timer import EngineTimer
from benchmarks.quiet import undisturbed
from benchmarks.step_timer import STEP, Steps, engine_steps
from benchmarks.workloads import Workload
from cluster.ray_engine import RayEngine
from llama4_dist.engine.options import EngineOptions

Terms = dict[str, float]
Measure = Callable[[Case], tuple[Terms, float]]
TOKENS = 24  # decoded by each sequence of a cluster in one measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement: seconds by station, the anchor's step beside it, and what others had of the processors."""

    case: Case
    round: int
    terms: Terms
    anchor_s: float
    others: float

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "Sample":
        return cls(**{**document, "case": Case(**document["case"])})


def can_slice() -> bool:
    """Tell whether this engine cuts experts over hosts."""
    return "expert_slices" in inspect.signature(RayEngine.__init__).parameters


def measure(
    cases: Iterable[Case], folder: Path, *, rounds: int, num_steps: int, on_sample: Callable[[Sample], None]
) -> None:
    """Measure every case `rounds` times; cases of one engine take turns, so that a slow minute falls on all."""
    with in_process(folder, ANCHOR.model, num_steps) as anchor:
        for (_, hosts, *_), group in groupby(sorted(cases, key=_engine_of), key=_engine_of):
            of_engine = list(group)
            with (
                _engine(folder, of_engine[0], num_steps)
                if hosts or of_engine[0].model != ANCHOR.model
                else _same(anchor) as run
            ):
                for number in range(rounds):
                    for case in of_engine:
                        on_sample(_sample(case, number, run, anchor))


def _engine_of(case: Case) -> tuple[str, int, int, int]:
    return (case.model, case.hosts, case.replicas, case.slices)


def _sample(case: Case, number: int, run: Measure, anchor: Measure) -> Sample:
    before, others_before = anchor(ANCHOR)
    terms, others = run(case)
    after, others_after = anchor(ANCHOR)
    return Sample(
        case=case,
        round=number,
        terms=terms,
        anchor_s=statistics.fmean((before[STEP], after[STEP])),
        others=max(others, others_before, others_after),
    )


@contextmanager
def _same(anchor: Measure) -> Iterator[Measure]:
    yield anchor


@contextmanager
def _engine(folder: Path, case: Case, num_steps: int) -> Iterator[Measure]:
    opened = in_process(folder, case.model, num_steps) if case.hosts == 0 else on_cluster(folder, case)
    with opened as run:
        yield run


@contextmanager
def in_process(folder: Path, model: str, num_steps: int) -> Iterator[Measure]:
    """Yield what times a case in this process, station by station."""
    options = EngineOptions(kv_cache_bytes=1 << 29, max_num_seqs=32, enable_prefix_caching=False)
    with engine_steps(checkpoint(folder, model), options, num_threads=CORES) as steps:

        def run(case: Case) -> tuple[Terms, float]:
            return _decode(steps, case, num_steps)

        yield run


def _decode(steps: Steps, case: Case, num_steps: int) -> tuple[Terms, float]:
    return steps.decode(case.batch, case.context, num_steps)


@contextmanager
def on_cluster(folder: Path, case: Case) -> Iterator[Measure]:
    """Yield what times a case on a Ray cluster of this machine, from its tokens' times."""
    cut: dict[str, Any] = {"expert_slices": case.slices} if can_slice() else {}
    engine = RayEngine(
        checkpoint(folder, case.model),
        num_expert_hosts=case.hosts,
        num_replicas=case.replicas,
        num_threads=1,
        expert_threads=1,
        options=EngineOptions(kv_cache_bytes=1 << 28, max_num_seqs=32, enable_prefix_caching=False, num_microbatches=1),
        **cut,
    )
    try:
        timer, number = EngineTimer(engine), iter(range(1 << 30))

        def run(one: Case) -> tuple[Terms, float]:
            # Half of the decoded tokens come after the context's middle: prompts are shorter by half of them.
            load = Workload(
                name="calibrate", batch=one.batch, prompt_tokens=one.context - TOKENS // 2, num_tokens=TOKENS
            )

            def once() -> float:
                prompts = load.prompts(next(number), BASE["vocab_size"])
                return one.batch / timer.decode(prompts, TOKENS).rate

            step_s, others = undisturbed(once, (os.getpid(),))
            return {STEP: step_s}, others

        run(case)  # maps weights
        yield run
    finally:
        engine.close()


def checkpoint(folder: Path, model: str) -> Path:
    """Return the random checkpoint of a model; written once."""
    path = folder / model.replace(" ", "-")
    return path if path.exists() else write_checkpoint(path, "float32", **(BASE | MODELS[model]))
