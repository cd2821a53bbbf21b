"""A part of a step as bytes, and back; whatever a plan names is checked against what the member has.

    msgpack [step, first microbatch, microbatches, token ids, logit rows, spans, traceparent]
    span    [tokens, cached, [[first block, page ids], ...]]

The last field is there only where the step has a span. Token ids, logit rows and page ids are little-endian int32 in
one string of bytes each.
"""

from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from llama4_dist.model.batch import Batch, PageRun, SequenceSpan
from llama4_dist.model.kv_layout import KVGroup
from llama4_dist.stages.links.defect import defect
from llama4_dist.stages.links.frame import MAX_HEADER_BYTES
from llama4_dist.telemetry.tracing import TRACEPARENT_LEN, is_traceparent

MAX_SPANS = 65536
_INT32 = np.dtype("<i4")
_MAX_STEP = 1 << 62
_MAX_POSITION = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRules:
    """What a plan may name: words, tokens in all, and pages of the cache, whose `groups` see what they see."""

    vocab_size: int
    max_tokens: int
    num_pages: int
    block_size: int
    groups: tuple[KVGroup, ...]


def encode_plan(part: Batch) -> bytes:
    """Write a part."""
    spans = [
        (span.num_tokens, span.num_cached, [(run.first_block, _bytes_of(run.ids_N)) for run in span.pages])
        for span in part.spans
    ]
    fields = (
        part.step,
        part.first_microbatch,
        part.num_microbatches,
        _bytes_of(part.token_ids_T.cpu().numpy()),
        _bytes_of(np.array(part.logit_rows)),
        spans,
    )
    packed: bytes = msgpack.packb((*fields, part.trace) if part.trace else fields)
    return packed


def decode_plan(received: bytes | bytearray, rules: PlanRules, *, device: torch.device | str = "cpu") -> Batch:
    """Read a part; FrameError where it is not one, or names what this member does not have."""
    try:
        return _decode(received, rules, device)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise defect("PLAN_SHAPE", f"a plan is not as it must be: {type(error).__name__}") from None


def _decode(received: bytes | bytearray, rules: PlanRules, device: torch.device | str) -> Batch:
    step, first_microbatch, num_microbatches, token_bytes, logit_bytes, spans, *trace = msgpack.unpackb(
        received,
        max_str_len=TRACEPARENT_LEN,
        max_bin_len=MAX_HEADER_BYTES,
        max_array_len=MAX_SPANS,
        max_map_len=0,
        max_ext_len=0,
    )
    token_ids = _ints_of(token_bytes, "TOKEN_RANGE", below=rules.vocab_size)
    logit_rows = _ints_of(logit_bytes, "LOGIT_ROW_RANGE", below=len(token_ids))
    _check(0 < len(token_ids) <= rules.max_tokens, "TOKEN_COUNT", f"{len(token_ids)} tokens came")
    _check(bool((np.diff(logit_rows) > 0).all()), "LOGIT_ROW_ORDER", "logit rows do not ascend")
    read = tuple(_span(fields, rules) for fields in spans)
    _check(sum(span.num_tokens for span in read) == len(token_ids), "TOKEN_COUNT", "spans hold other tokens")
    return Batch(
        step=_int(step, _MAX_STEP),
        token_ids_T=torch.from_numpy(token_ids.astype(np.int64)).to(device),
        spans=read,
        logit_rows=tuple(logit_rows.tolist()),
        num_microbatches=1 + _int(num_microbatches - 1, 2),
        first_microbatch=_int(first_microbatch, _MAX_STEP),
        trace=_trace(*trace) if trace else "",
    )


def _trace(received: Any) -> str:
    _check(type(received) is str and is_traceparent(received), "TRACE_SHAPE", "a trace that is no traceparent came")
    return str(received)


def _span(fields: Any, rules: PlanRules) -> SequenceSpan:
    num_tokens, num_cached, runs = fields
    _int(num_tokens - 1, rules.max_tokens)
    _int(num_cached, _MAX_POSITION)
    _check(len(runs) == len(rules.groups), "PAGE_GROUPS", f"{len(runs)} runs of pages for {len(rules.groups)} groups")
    end = num_cached + num_tokens
    pages = []
    for (first_block, id_bytes), group in zip(runs, rules.groups, strict=True):
        ids = _ints_of(id_bytes, "PAGE_RANGE", below=rules.num_pages)
        run = PageRun(first_block=_int(first_block, _MAX_POSITION), ids=tuple(ids.tolist()))
        seen = group.blocks(num_cached=num_cached, end=end, num_known=end, block_size=rules.block_size)
        holds = run.first_block <= seen.start and seen.stop <= run.stop_block
        _check(holds or not len(seen), "PAGES_MISSING", f"pages of blocks {run.first_block} to {run.stop_block} came")
        pages.append(run)
    return SequenceSpan(num_tokens=num_tokens, num_cached=num_cached, pages=tuple(pages))


def _bytes_of(values: NDArray[np.integer[Any]]) -> bytes:
    return values.astype(_INT32).tobytes()


def _ints_of(received: Any, reason: str, *, below: int) -> NDArray[np.int32]:
    if type(received) is not bytes:
        raise TypeError
    values = np.frombuffer(received, dtype=_INT32)
    inside = not len(values) or (values.min() >= 0 and values.max() < below)
    _check(bool(inside), reason, f"a number that is not in [0, {below}) came")
    return values


def _int(value: Any, below: int) -> int:
    _check(type(value) is int and 0 <= value < below, "NUMBER_RANGE", f"a number that is not in [0, {below}) came")
    return int(value)


def _check(holds: bool, reason: str, message: str) -> None:
    if not holds:
        raise defect(reason, f"a plan is not as it must be: {message}")
