"""Plans, outputs and errors come back as they were sent; whatever else comes is refused before it is used."""

from dataclasses import replace
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama4_dist.errors import EngineError, FrameError, InvalidRequestError, Llama4Error, UnavailableError
from llama4_dist.model.batch import Batch, PageRun, SequenceSpan
from llama4_dist.model.kv_layout import KVGroup
from llama4_dist.stages.links.errors import error_from_wire, error_to_wire
from llama4_dist.stages.links.frame import FrameBounds, MessageKind, prefix_of, read_prefix
from llama4_dist.stages.links.output_codec import OutputRules, decode_output, encode_output
from llama4_dist.stages.links.plan_codec import PlanRules, decode_plan, encode_plan
from llama4_dist.stages.ports import StageOutput, worker_lost
from llama4_dist.telemetry.tracing import is_traceparent

GROUPS = (KVGroup(layers=(0, 1), chunk_size=None), KVGroup(layers=(2,), chunk_size=16))
RULES = PlanRules(vocab_size=100, max_tokens=64, num_pages=50, block_size=8, groups=GROUPS)
OUTPUTS = OutputRules(width=6, max_rows=9)
TRACE = f"00-{'ab' * 16}-{'cd' * 8}-01"


@st.composite
def spans(draw: st.DrawFn) -> SequenceSpan:
    num_tokens, num_cached = draw(st.integers(1, 8)), draw(st.integers(0, 100))
    end, runs = num_cached + num_tokens, []
    for group in GROUPS:
        seen = group.blocks(num_cached=num_cached, end=end, num_known=end, block_size=8)
        first = draw(st.integers(0, seen.start))
        count = seen.stop - first + draw(st.integers(0, 2))
        runs.append(
            PageRun(first_block=first, ids=tuple(draw(st.lists(st.integers(0, 49), min_size=count, max_size=count))))
        )
    return SequenceSpan(num_tokens=num_tokens, num_cached=num_cached, pages=tuple(runs))


@st.composite
def parts(draw: st.DrawFn) -> Batch:
    chosen = draw(st.lists(spans(), min_size=1, max_size=5))
    count = sum(span.num_tokens for span in chosen)
    return Batch(
        step=draw(st.integers(0, 1 << 40)),
        token_ids_T=torch.tensor(draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))),
        spans=tuple(chosen),
        logit_rows=tuple(sorted(draw(st.sets(st.integers(0, count - 1))))),
        num_microbatches=draw(st.integers(1, 2)),
        first_microbatch=draw(st.integers(0, 9)),
        trace=draw(st.sampled_from(("", TRACE))),
    )


def plain(part: Batch) -> Any:
    pages = [[(run.first_block, run.ids) for run in span.pages] for span in part.spans]
    counts = [(span.num_tokens, span.num_cached) for span in part.spans]
    microbatches = part.num_microbatches, part.first_microbatch
    return part.step, part.token_ids_T.tolist(), counts, pages, part.logit_rows, microbatches, part.trace


@given(parts())
def test_a_plan_comes_back_as_it_was_sent(part: Batch) -> None:
    read = decode_plan(encode_plan(part), RULES)
    assert plain(read) == plain(part)
    assert read.token_ids_T.dtype == torch.int64


@given(parts(), st.data())
def test_a_plan_that_was_cut_or_altered_is_refused_or_names_only_what_is_there(
    part: Batch, data: st.DataObject
) -> None:
    """Whatever a byte becomes: no exception but FrameError, and no page, token or row that the member has not."""
    sent = bytearray(encode_plan(part))
    for _ in range(data.draw(st.integers(1, 3))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    sent = sent[: data.draw(st.integers(0, len(sent)))] if data.draw(st.booleans()) else sent
    try:
        read = decode_plan(sent, RULES)
    except FrameError:
        return
    assert not read.trace or is_traceparent(read.trace)
    assert 0 < len(read.token_ids_T) <= RULES.max_tokens
    assert read.token_ids_T.max() < RULES.vocab_size
    assert all(0 <= page < RULES.num_pages for span in read.spans for run in span.pages for page in run.ids)
    for span in read.spans:
        end = span.num_cached + span.num_tokens
        for group, run in zip(GROUPS, span.pages, strict=True):
            seen = group.blocks(num_cached=span.num_cached, end=end, num_known=end, block_size=8)
            assert not len(seen) or (run.first_block <= seen.start and seen.stop <= run.stop_block)


ONE = Batch(
    step=3,
    token_ids_T=torch.tensor([7, 8]),
    spans=(
        SequenceSpan(
            num_tokens=2,
            num_cached=15,
            pages=(PageRun(first_block=0, ids=(4, 5, 6)), PageRun(first_block=0, ids=(7, 8, 9))),
        ),
    ),
    logit_rows=(1,),
)


def with_pages(*runs: PageRun) -> Batch:
    return replace(ONE, spans=(replace(ONE.spans[0], pages=runs),))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (replace(ONE, token_ids_T=torch.tensor([7, 100])), "TOKEN_RANGE"),
        (replace(ONE, token_ids_T=torch.tensor([7, -1])), "TOKEN_RANGE"),
        (replace(ONE, token_ids_T=torch.tensor([7]), logit_rows=()), "TOKEN_COUNT"),
        (replace(ONE, token_ids_T=torch.tensor([], dtype=torch.int64), logit_rows=(), spans=()), "TOKEN_COUNT"),
        (replace(ONE, logit_rows=(2,)), "LOGIT_ROW_RANGE"),
        (replace(ONE, logit_rows=(1, 0)), "LOGIT_ROW_ORDER"),
        (replace(ONE, step=-1), "NUMBER_RANGE"),
        (replace(ONE, num_microbatches=3), "NUMBER_RANGE"),
        (replace(ONE, trace=TRACE[:-1]), "TRACE_SHAPE"),
        (replace(ONE, trace=TRACE.upper()), "TRACE_SHAPE"),
        (replace(ONE, trace=TRACE + "0"), "PLAN_SHAPE"),  # longer than any
        (replace(ONE, trace=TRACE.encode()), "TRACE_SHAPE"),  # type: ignore[arg-type]
        (with_pages(*ONE.spans[0].pages[:1]), "PAGE_GROUPS"),
        (with_pages(PageRun(first_block=0, ids=(4, 5, 50)), ONE.spans[0].pages[1]), "PAGE_RANGE"),
        (with_pages(PageRun(first_block=0, ids=(4, 5)), ONE.spans[0].pages[1]), "PAGES_MISSING"),
        (with_pages(PageRun(first_block=1, ids=(5, 6)), ONE.spans[0].pages[1]), "PAGES_MISSING"),
    ],
)
def test_a_plan_that_names_what_is_not_there_is_refused(part: Batch, reason: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode_plan(encode_plan(part), RULES)
    assert caught.value.reason == reason


def test_a_plan_says_where_it_is_in_a_trace_only_if_it_is_in_one() -> None:
    plain, traced = (encode_plan(replace(ONE, trace=trace)) for trace in ("", TRACE))
    assert len(msgpack.unpackb(plain)) == 6
    assert len(traced) - len(plain) <= len(TRACE) + 2
    with pytest.raises(FrameError) as caught:
        decode_plan(msgpack.packb([*msgpack.unpackb(traced), TRACE]), RULES)
    assert caught.value.reason == "PLAN_SHAPE"


@given(st.binary(max_size=200))
def test_bytes_that_are_no_plan_are_refused(received: bytes) -> None:
    with pytest.raises(FrameError):
        decode_plan(received, RULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_rows_come_back_bit_by_bit(dtype: torch.dtype, num_rows: int) -> None:
    rows = torch.randn(num_rows, 6).to(dtype)
    header, payload = encode_output(StageOutput(step=4, microbatch=2, rows=rows, wrong_answers={"expert-3": 2}))
    read = decode_output(header, len(payload), OUTPUTS)
    read.payload[:] = payload
    output = read.output("cpu")
    assert isinstance(output.rows, Tensor)
    assert torch.equal(output.rows, rows)
    assert (output.place, output.rows.dtype, output.wrong_answers) == ((4, 2), dtype, {"expert-3": 2})


def header_of(body: object, wrong: object = ()) -> bytes:
    packed: bytes = msgpack.packb((4, 2, wrong, body))
    return packed


@pytest.mark.parametrize(
    ("header", "payload_len", "reason"),
    [
        (header_of((1, 10, 6)), 10 * 6 * 4, "ROWS_WRONG"),
        (header_of((1, 1 << 40, 6)), (1 << 40) * 24, "ROWS_WRONG"),
        (header_of((1, 2, 7)), 2 * 7 * 4, "ROWS_WRONG"),
        (header_of((9, 2, 6)), 2 * 6 * 4, "ROWS_WRONG"),
        (header_of((1, 2, 6)), 2 * 6 * 4 - 1, "PAYLOAD_LENGTH"),
        (header_of((1, -2, 6)), 0, "NUMBER_RANGE"),
        (header_of((1, 2, 6), wrong=(("", 1),)), 48, "HOST_NAME"),
        (header_of((2, "X", "text", 0.0)), 5, "PAYLOAD_LENGTH"),
        (header_of((7, "X", "text", 0.0)), 0, "ERROR_RANGE"),
        (header_of((2, "X", "text", float("inf"))), 0, "ERROR_RANGE"),
        (header_of((2, 5, "text", 0.0)), 0, "ERROR_SHAPE"),
        (header_of(()), 0, "ERROR_SHAPE"),
        (b"\xc1", 0, "OUTPUT_SHAPE"),
        (msgpack.packb(7), 0, "OUTPUT_SHAPE"),
    ],
)
def test_an_output_that_is_not_due_takes_no_memory(header: bytes, payload_len: int, reason: str) -> None:
    def empty(*shape: int, **options: Any) -> Tensor:
        raise AssertionError(f"memory was taken for {shape}")

    with pytest.raises(FrameError) as caught:
        decode_output(header, payload_len, OUTPUTS, empty=empty)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (worker_lost("gone"), UnavailableError),
        (UnavailableError("no host", reason="EXPERT_UNREACHABLE"), UnavailableError),
        (EngineError("a defect"), EngineError),
        (InvalidRequestError([]), EngineError),  # not on the list
        (UnavailableError("x" * 5000), UnavailableError),
    ],
)
def test_errors_come_back_as_their_kind(sent: Llama4Error, read: type[Llama4Error]) -> None:
    back = error_from_wire(list(error_to_wire(sent)))
    assert type(back) is read
    assert (back.reason, back.retry_after_s) == (sent.reason, sent.retry_after_s)
    assert back.message == sent.message[:1024]


@pytest.mark.parametrize(
    ("at", "byte", "reason"),
    [(0, 0, "MAGIC_WRONG"), (4, 9, "VERSION_UNKNOWN"), (6, 3, "KIND_WRONG"), (8, 1, "SEQUENCE_WRONG"),
     (28, 1, "MAGIC_WRONG"), (27, 1, "HEADER_LENGTH"), (39, 1, "PAYLOAD_LENGTH")],
)  # fmt: skip
def test_a_prefix_out_of_bounds_is_refused(at: int, byte: int, reason: str) -> None:
    bounds = FrameBounds(kind=MessageKind.OUTPUT, max_payload_bytes=100)
    prefix = bytearray(prefix_of(MessageKind.OUTPUT, 0, b"head", memoryview(b"body")))
    assert read_prefix(prefix, 0, bounds)[1:] == (4, 4)
    prefix[at] = byte
    with pytest.raises(FrameError) as caught:
        read_prefix(prefix, 0, bounds)
    assert caught.value.reason == reason
