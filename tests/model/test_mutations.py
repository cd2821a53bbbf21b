"""Each known misreading of Llama 4, switched in on purpose, moves the logits far past the tolerance of test_logits.

The readings are those that engines really shipped; a comparison that none of them fails would prove nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model import attention, attention_plan, key_axes, llama4, router
from llama4_dist.model.batch import SequenceSpan
from llama4_dist.model.query_runs import QueryRun, query_runs
from llama4_dist.model.rope import frequencies, query_temperature
from tests.checkpoints import make_checkpoint
from tests.model import direct
from tests.model.direct import Runner
from tests.model.references import load_reference, reference_logits
from tests.plain_experts import plain

Patch = Callable[[pytest.MonkeyPatch], None]
MOVED = 1e-2  # fifty times the tolerance
TOKEN_IDS = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def checkpoint(in_torch: None, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("scout"), "scout"))


@pytest.fixture(scope="module")
def expected_TV(checkpoint: Checkpoint) -> Tensor:
    return reference_logits(load_reference(Path(checkpoint.path), "scout"), TOKEN_IDS)


def deviation(checkpoint: Checkpoint, expected_TV: Tensor, sizes: list[int]) -> float:
    logits_TV = Runner.load(checkpoint).in_chunks(TOKEN_IDS, sizes)
    return float((logits_TV - expected_TV).abs().max())


def half_split_rotation(patch: pytest.MonkeyPatch) -> None:
    def rotate(x_THC: Tensor, rotation_T1C: Tensor) -> Tensor:
        turned = torch.complex(*x_THC.chunk(2, dim=-1)) * rotation_T1C
        return torch.cat([turned.real, turned.imag], dim=-1)

    patch.setattr(attention, "rotate", rotate)


def score_on_the_output(patch: pytest.MonkeyPatch) -> None:
    def dispatch(
        self: direct.DirectDispatcher, layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor, _: int
    ) -> list[Tensor]:
        return [scores_TK * honest(self, layer, x_TD, experts_TK, torch.ones_like(scores_TK))[0]]

    honest = direct.DirectDispatcher.dispatch
    patch.setattr(direct.DirectDispatcher, "dispatch", dispatch)


def softmax_scores(patch: pytest.MonkeyPatch) -> None:
    def call(self: router.Router, x_TD: Tensor) -> router.Route:
        scores, experts = (x_TD @ self.weight_ED.T).softmax(-1).topk(self.experts_per_token)
        return router.Route(experts_TK=experts, scores_TK=scores)

    patch.setattr(router.Router, "__call__", call)


def no_chunks(patch: pytest.MonkeyPatch) -> None:
    honest = query_runs
    patch.setattr(key_axes, "query_runs", lambda spans, chunk_size: honest(spans, None))


def no_chunks_in_decode(patch: pytest.MonkeyPatch) -> None:
    """What Meta's own reference does: with one query it passes no mask."""
    honest = query_runs

    def chunked(spans: list[SequenceSpan], size: int | None) -> list[QueryRun]:
        is_decode = all(span.num_tokens == 1 for span in spans)
        return list(honest(spans, None if is_decode else size))

    patch.setattr(key_axes, "query_runs", chunked)


def no_qk_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "rms_norm", lambda x, weight, eps: x)


def no_temperature(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention_plan, "query_temperature", lambda positions, floor, scale: torch.ones(len(positions)))


def temperature_from_position_zero(patch: pytest.MonkeyPatch) -> None:
    honest = query_temperature
    patch.setattr(attention_plan, "query_temperature", lambda p, floor, scale: honest(p - 1, floor, scale))


def no_frequency_scaling(patch: pytest.MonkeyPatch) -> None:
    honest = frequencies
    patch.setattr(llama4, "frequencies", lambda head_dim, theta, scaling: honest(head_dim, theta, None))


def swapped_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    honest = Checkpoint.expert

    def expert(self: Checkpoint, layer: int, index: int) -> ExpertWeights:
        weights = plain(honest(self, layer, index))
        return replace(weights, gate_DF=weights.up_DF, up_DF=weights.gate_DF, gate_up_D2F=None)

    patch.setattr(Checkpoint, "expert", expert)


PREFILL, DECODE = [len(TOKEN_IDS)], [5, 1]
MUTATIONS: list[tuple[Patch, list[int]]] = [
    (half_split_rotation, PREFILL),
    (score_on_the_output, PREFILL),
    (softmax_scores, PREFILL),
    (no_chunks, PREFILL),
    (no_chunks_in_decode, DECODE),
    (no_qk_norm, PREFILL),
    (no_temperature, PREFILL),
    (no_temperature, DECODE),
    (temperature_from_position_zero, DECODE),
    (no_frequency_scaling, PREFILL),
    (swapped_gate_and_up, PREFILL),
]


@pytest.mark.parametrize("sizes", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_the_right_reading_stays_inside_the_tolerance(
    checkpoint: Checkpoint, expected_TV: Tensor, sizes: list[int]
) -> None:
    assert deviation(checkpoint, expected_TV, sizes) < 2e-4


@pytest.mark.parametrize(("mutate", "sizes"), MUTATIONS, ids=lambda v: v.__name__ if callable(v) else f"{v[0]}-first")
def test_a_wrong_reading_moves_the_logits(
    checkpoint: Checkpoint, expected_TV: Tensor, monkeypatch: pytest.MonkeyPatch, mutate: Patch, sizes: list[int]
) -> None:
    mutate(monkeypatch)
    assert deviation(checkpoint, expected_TV, sizes) > MOVED
