"""Computes the logits of every position of a text, one chunk at a time, so that running requests go on in between."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama4_dist.engine.engine import EngineCore
from llama4_dist.errors import FieldViolation, InvalidRequestError
from llama4_dist.model.batch import Batch, SequenceSpan


@dataclass(eq=False, slots=True, kw_only=True)
class ScoreJob:
    """A text half scored: `parts` hold the logits of the first `num_cached` positions."""

    owner: str
    token_ids: tuple[int, ...]
    chunk_size: int
    num_cached: int = 0
    parts: list[Tensor] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.num_cached == len(self.token_ids)


def make_job(core: EngineCore, owner: str, token_ids: Sequence[int], chunk_size: int | None) -> ScoreJob:
    """Check a text against the engine's limits. Raises InvalidRequestError."""
    limits, options = core.limits, core.options
    if not 1 <= len(token_ids) <= limits.max_context:
        raise _invalid("token_ids", f"{len(token_ids)} tokens; give 1 to {limits.max_context}")
    num_bytes = 4 * len(token_ids) * limits.vocab_size
    if num_bytes > options.max_score_bytes:
        raise _invalid("token_ids", f"logits of {num_bytes} bytes exceed max_score_bytes={options.max_score_bytes}")
    if not all(0 <= token_id < limits.vocab_size for token_id in token_ids):
        raise _invalid("token_ids", f"each id must be in [0, {limits.vocab_size})")
    if chunk_size is not None and chunk_size < 1:
        raise _invalid("chunk_size", f"{chunk_size} must be at least 1")
    largest = options.max_num_batched_tokens
    size = min(largest, options.max_logit_rows) if chunk_size is None else min(chunk_size, largest)
    return ScoreJob(owner=owner, token_ids=tuple(token_ids), chunk_size=size)


def advance(core: EngineCore, job: ScoreJob) -> None:
    """Score the next chunk, within one chunk of attention; its pages may cost the youngest sequences theirs.

    Steps in flight are waited for first.
    """
    core.drain()
    scheduler, first, num_known = core.scheduler, job.num_cached, len(job.token_ids)
    end = min(first + job.chunk_size, num_known, scheduler.layout.next_edge(first) or num_known)
    chunk = job.token_ids[first:end]
    pages = scheduler.borrow(job.owner, num_cached=first, end=end, num_known=num_known)
    span = SequenceSpan(num_tokens=len(chunk), num_cached=first, pages=pages)
    batch = Batch(
        step=core.counters.next_step(),
        token_ids_T=torch.tensor(chunk, dtype=torch.int64, device=core.runner.device),
        spans=(span,),
        logit_rows=tuple(range(len(chunk))),
    )
    job.parts.append(core.runner.forward(batch).cpu())
    job.num_cached += len(chunk)


def _invalid(field_name: str, description: str) -> InvalidRequestError:
    return InvalidRequestError([FieldViolation(field=field_name, description=description)])
