"""A running request as public messages: the whole answer, or what is new since a reader last looked. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from llama4_dist.gateway.running import RunningRequest, SequenceRecord
from llama4_dist.request import CompletionOutput, FinishReason
from llama4_dist.rpc import wire_results
from llama4_dist.rpc.wire import GenerationCall
from llama4_dist.v1 import inference_pb2, types_pb2

AnswerT = TypeVar("AnswerT", inference_pb2.GenerateResponse, inference_pb2.ChatResponse)
Event = inference_pb2.StreamGenerateResponse | inference_pb2.StreamChatResponse


@dataclass(slots=True)
class Cursor:
    """How much of one sequence a reader has been given."""

    num_texts: int = 0
    num_tokens: int = 0
    finished: bool = False


class EventReader:
    """Makes the events of one reader; a stream's first event is Started and its last carries the usage."""

    def __init__(self, running: RunningRequest, call: GenerationCall, model: str, event_class: type[Event]) -> None:
        self._running = running
        self._call = call
        self._model = model
        self._event_class = event_class
        self._started = False
        self._cursors = tuple(Cursor() for _ in running.sequences)

    def new_events(self) -> list[Event]:
        """Return what is new, at most one delta per sequence however many steps passed.

        A list, not a generator: the record grows while events are being sent.
        """
        if not self._running.begun:
            return []
        started = [] if self._started else [self._event_class(started=self._start())]
        self._started = True
        for index, (sequence, cursor) in enumerate(zip(self._running.sequences, self._cursors, strict=True)):
            started.extend(self._of_sequence(index, sequence, cursor))
        return started

    def _of_sequence(self, index: int, sequence: SequenceRecord, cursor: Cursor) -> Iterator[Event]:
        text = "".join(sequence.texts[cursor.num_texts :])
        if text or len(sequence.token_ids) > cursor.num_tokens:
            delta = types_pb2.TokenDelta(output_index=index, text=text)
            if self._call.return_token_ids:
                delta.token_ids.extend(sequence.token_ids[cursor.num_tokens :])
            delta.logprobs.extend(wire_results.logprobs_to_proto(sequence.logprobs[cursor.num_tokens :]))
            yield self._event_class(delta=delta)
        cursor.num_texts, cursor.num_tokens = len(sequence.texts), len(sequence.token_ids)
        if sequence.finish_reason is not None and not cursor.finished:
            cursor.finished = True
            yield self._event_class(finished=self._finish(index, sequence, sequence.finish_reason), usage=self._usage())

    def _start(self) -> types_pb2.Started:
        running = self._running
        queue_time = Duration()
        queue_time.FromMicroseconds(round(running.queue_s * 1e6))
        return types_pb2.Started(
            request_id=running.request_id,
            model=self._model,
            prompt_tokens=len(running.prompt_token_ids),
            queue_time=queue_time,
            prompt_token_ids=running.prompt_token_ids if self._call.return_prompt_token_ids else (),
            prompt_logprobs=wire_results.logprobs_to_proto(running.prompt_logprobs or ()),
        )

    def _finish(self, index: int, sequence: SequenceRecord, reason: FinishReason) -> types_pb2.Finished:
        return types_pb2.Finished(
            output_index=index,
            finish_reason=wire_results.FINISH_REASONS[reason],
            stop_match=wire_results.stop_to_proto(sequence.stop_reason),
        )

    def _usage(self) -> types_pb2.Usage | None:
        """Only on the event that ends the last sequence."""
        if not all(cursor.finished for cursor in self._cursors):
            return None
        return wire_results.usage_to_proto(self._running.usage)


def whole_answer(running: RunningRequest, call: GenerationCall, model: str, answer_class: type[AnswerT]) -> AnswerT:
    """Build the answer of a unary call; the request must be done without error."""
    outputs = [
        wire_results.output_to_proto(completed(index, sequence), return_token_ids=call.return_token_ids)
        for index, sequence in enumerate(running.sequences)
    ]
    return answer_class(
        request_id=running.request_id,
        model=model,
        outputs=outputs,
        usage=wire_results.usage_to_proto(running.usage),
        prompt_token_ids=running.prompt_token_ids if call.return_prompt_token_ids else (),
        prompt_logprobs=wire_results.logprobs_to_proto(running.prompt_logprobs or ()),
    )


def completed(index: int, sequence: SequenceRecord) -> CompletionOutput:
    """Freeze a finished sequence."""
    assert sequence.finish_reason is not None, "an unfinished sequence was answered"
    return CompletionOutput(
        index=index,
        text="".join(sequence.texts),
        token_ids=tuple(sequence.token_ids),
        logprobs=tuple(sequence.logprobs),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
