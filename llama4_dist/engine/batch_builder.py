"""Turns planned spans into the model's batch and remembers which logit row belongs to whom."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llama4_dist.engine.plan import PlannedSpan
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.model.batch import Batch, SequenceSpan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptRows:
    """Logit rows `start` to `stop` are those of positions `first_position`, … of this sequence's prompt."""

    sequence: SequenceState
    start: int
    stop: int
    first_position: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """The batch, the sequences that sample with their logit rows, and the prompt rows that want log-probabilities."""

    batch: Batch
    sampled: tuple[SequenceState, ...]
    sampled_rows: tuple[int, ...]
    prompt_rows: tuple[PromptRows, ...]


def build_batch(planned_spans: Iterable[PlannedSpan], *, step: int, device: str, trace: str = "") -> StepBatch:
    """Pack the spans; ask for logits where a sequence's last token stands, and for prompt rows if wanted."""
    token_ids: list[int] = []
    spans: list[SequenceSpan] = []
    logit_rows: list[int] = []
    sampled: list[SequenceState] = []
    sampled_rows: list[int] = []
    prompt_rows: list[PromptRows] = []
    for planned in planned_spans:
        sequence, first, count = planned.sequence, planned.sequence.num_cached, planned.num_tokens
        if sequence.wants_prompt_logprobs:
            wanted = min(count, sequence.num_prompt_tokens - 1 - first)  # the last prompt row predicts an output token
            start = len(logit_rows)
            logit_rows += range(len(token_ids), len(token_ids) + wanted)
            prompt_rows.append(PromptRows(sequence=sequence, start=start, stop=len(logit_rows), first_position=first))
        if count == sequence.num_pending:
            sampled.append(sequence)
            sampled_rows.append(len(logit_rows))
            logit_rows.append(len(token_ids) + count - 1)
        token_ids += sequence.tokens[first : first + count]
        spans.append(SequenceSpan(num_tokens=count, num_cached=first, pages=sequence.pages))
    batch = Batch(
        step=step,
        token_ids_T=torch.tensor(token_ids, dtype=torch.int64, device=device),
        spans=tuple(spans),
        logit_rows=tuple(logit_rows),
        trace=trace,
    )
    return StepBatch(
        batch=batch,
        sampled=tuple(sampled),
        sampled_rows=tuple(sampled_rows),
        prompt_rows=tuple(prompt_rows),
    )
