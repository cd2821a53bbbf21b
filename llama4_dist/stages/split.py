"""Cuts a step into parts that follow each other through the stages; pure."""

from dataclasses import replace

import torch

from llama4_dist.model.batch import Batch
from llama4_dist.model.microbatches import split_spans


def split_batch(batch: Batch, num_parts: int) -> tuple[Batch, ...]:
    """Return parts of a step whose token counts differ by one at most, fewer where there are fewer tokens.

    Each has the logit rows of its own tokens, counted from its first, so the parts' logits stand one after the other as
    the step's would. ValueError where `logit_rows` do not ascend.
    """
    if any(row >= after for row, after in zip(batch.logit_rows, batch.logit_rows[1:], strict=False)):
        raise ValueError(f"logit_rows={batch.logit_rows} must ascend: parts give their rows in the order of tokens")
    spans_of_parts = split_spans(batch.spans, num_parts)
    if len(spans_of_parts) == 1:
        return (batch,)
    counts = [sum(span.num_tokens for span in spans) for spans in spans_of_parts]
    parts, first = [], 0
    for number, (spans, token_ids_T) in enumerate(
        zip(spans_of_parts, torch.split(batch.token_ids_T, counts), strict=True)
    ):
        end = first + len(token_ids_T)
        parts.append(
            replace(
                batch,
                spans=spans,
                token_ids_T=token_ids_T,
                logit_rows=tuple(row - first for row in batch.logit_rows if first <= row < end),
                first_microbatch=batch.first_microbatch + number * batch.num_microbatches,
            )
        )
        first = end
    return tuple(parts)
