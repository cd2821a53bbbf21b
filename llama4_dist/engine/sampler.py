"""Turns logits into tokens; knows sequences and their settings, no model and no scheduler.

Order of operations, as in vLLM: log-probabilities from the raw logits; allowed and bad tokens, min_tokens, logit_bias;
repetition, frequency and presence penalties; then argmax, or temperature, min_p, top_k, top_p and one draw.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_dist.engine.draw import GREEDY_BELOW, draw
from llama4_dist.engine.logprobs import position_logprobs
from llama4_dist.engine.masks import apply_masks, needs_masks
from llama4_dist.engine.penalties import apply_penalties, needs_penalties
from llama4_dist.engine.scan import scan
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.errors import EngineError, Llama4Error
from llama4_dist.request import PositionLogprobs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One row's token, and its log-probabilities where asked for."""

    token_id: int
    logprobs: PositionLogprobs | None = None


def sample(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> list[Sampled | Llama4Error]:
    """Sample one token per row; a row that cannot be sampled gives an error and leaves the others alone."""
    try:
        return _sample_rows(logits_PV, sequences)
    except Exception as error:  # noqa: BLE001 - whatever one row does, the other rows go on
        if len(sequences) == 1:
            return [_as_engine_error(error, sequences[0].request_id)]
        return [result for row, s in enumerate(sequences) for result in sample(logits_PV[row : row + 1], [s])]


def _as_engine_error(error: Exception, request_id: str) -> Llama4Error:
    if isinstance(error, Llama4Error):
        return error
    log.error("sample_failed request_id=%s", request_id, exc_info=error)
    return EngineError(f"sampling failed: {type(error).__name__}")


def _sample_rows(logits_PV: Tensor, sequences: Sequence[SequenceState]) -> list[Sampled | Llama4Error]:
    best, finite = scan(logits_PV)
    token_ids = _choose(logits_PV, best, sequences)
    wanting = [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]
    logprobs: dict[int, PositionLogprobs] = {}
    if wanting:
        num_top = [sequences[row].sampling.logprobs or 0 for row in wanting]
        found = position_logprobs(logits_PV[wanting], [token_ids[row] for row in wanting], num_top)
        logprobs = dict(zip(wanting, found, strict=True))
    return [
        Sampled(token_id=token_ids[row], logprobs=logprobs.get(row))
        if finite[row]
        else EngineError("the model's logits are not finite numbers")
        for row in range(len(sequences))
    ]


def _choose(logits_PV: Tensor, best: Sequence[int], sequences: Sequence[SequenceState]) -> list[int]:
    """Return one token id per row; rows that are not finite get some token, which the caller drops.

    `best` are the likeliest tokens before masks and penalties.
    """
    token_ids = list(best)
    masked = [row for row, s in enumerate(sequences) if needs_masks(s)]
    penalised = [row for row, s in enumerate(sequences) if needs_penalties(s)]
    if masked or penalised:
        logits_PV = logits_PV.clone()
    for rows, apply in ((masked, apply_masks), (penalised, apply_penalties)):
        if rows:
            part_PV = logits_PV[rows]
            apply(part_PV, [sequences[row] for row in rows])
            logits_PV[rows] = part_PV
    changed = sorted({*masked, *penalised})
    if changed:
        for row, token_id in zip(changed, scan(logits_PV[changed])[0], strict=True):
            token_ids[row] = token_id
    if masked and logits_PV[masked].amax(dim=1).isneginf().any():
        raise EngineError("allowed_token_ids, bad_token_ids and min_tokens leave no token")
    drawn = [row for row, s in enumerate(sequences) if s.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        # A row that is not finite would make the draw of all rows fail; the caller drops it in any case.
        part_PV = logits_PV[drawn].nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf)
        for row, token_id in zip(drawn, draw(part_PV, [sequences[row] for row in drawn]), strict=True):
            token_ids[row] = token_id
    return token_ids
