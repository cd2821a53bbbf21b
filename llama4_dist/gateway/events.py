"""A running request as public messages: the whole answer, or what is new since a reader last looked. Pure."""

from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from llama4_dist.gateway.running import RunningRequest, coalesced
from llama4_dist.rpc import wire_results
from llama4_dist.rpc.wire import GenerationCall
from llama4_dist.text.output_sequence import Delta, Finished
from llama4_dist.v1 import inference_pb2, types_pb2

AnswerT = TypeVar("AnswerT", inference_pb2.GenerateResponse, inference_pb2.ChatResponse)
Event = inference_pb2.StreamGenerateResponse | inference_pb2.StreamChatResponse


class EventReader:
    """Makes the events of one reader; a stream's first event is Started and its last carries the usage.

    `resume` are the numbers of tokens, by sequence, that the client has already: their deltas are left out.
    """

    def __init__(
        self,
        running: RunningRequest,
        call: GenerationCall,
        model: str,
        event_class: type[Event],
        resume: tuple[int, ...] | None = None,
    ) -> None:
        self._running = running
        self._to_skip = {index: number for index, number in enumerate(resume or ()) if number}
        self._call = call
        self._model = model
        self._event_class = event_class
        self._started = False
        self._num_read = 0
        self._num_ended = 0

    def new_events(self) -> list[Event]:
        """Return what is new, at most one delta per sequence however many steps passed.

        A list, not a generator: the record grows while events are being sent.
        """
        if not self._running.begun:
            return []
        events = [] if self._started else [self._event_class(started=self._start())]
        self._started = True
        unread = self._running.events[self._num_read :]
        self._num_read += len(unread)
        if self._to_skip:
            unread = [one for one in unread if not self._is_known(one)]
        for one in coalesced(unread):
            event = self._delta(one) if isinstance(one, Delta) else self._finish(one)
            if event is not None:
                events.append(event)
        return events

    def _is_known(self, one: Delta | Finished) -> bool:
        """Tell whether the client has this; an event of the record has at most one token."""
        num_left = self._to_skip.get(one.index, 0)
        if isinstance(one, Finished) or num_left == 0:
            return False
        self._to_skip[one.index] = num_left - len(one.token_ids)
        return True

    def _start(self) -> types_pb2.Started:
        state = self._running.state
        queue_time = Duration()
        queue_time.FromMicroseconds(round((state.queue_s or 0.0) * 1e6))
        return types_pb2.Started(
            request_id=self._running.request_id,
            model=self._model,
            prompt_tokens=len(state.prompt_token_ids),
            queue_time=queue_time,
            prompt_token_ids=state.prompt_token_ids if self._call.return_prompt_token_ids else (),
            prompt_logprobs=wire_results.logprobs_to_proto(state.prompt_logprobs or ()),
            seed=state.sampling.seed,
        )

    def _delta(self, delta: Delta) -> Event | None:
        """Build a delta; None if it would say nothing (text held back, tokens not asked for)."""
        event = self._event_class()
        message = event.delta  # filled in place, and only where it differs: the hottest message there is
        if delta.index:
            message.output_index = delta.index
        if delta.text:
            message.text = delta.text
        if self._call.return_token_ids:
            message.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            message.logprobs.extend(wire_results.logprobs_to_proto(delta.logprobs))
        return event if delta.text or message.token_ids or message.logprobs else None

    def _finish(self, end: Finished) -> Event:
        self._num_ended += 1
        is_last = self._num_ended == self._running.state.sampling.n
        message = types_pb2.Finished(
            output_index=end.index,
            finish_reason=wire_results.FINISH_REASONS[end.finish_reason],
            stop_match=wire_results.stop_to_proto(end.stop_reason),
        )
        usage = wire_results.usage_to_proto(self._running.state.usage) if is_last else None
        return self._event_class(finished=message, usage=usage)


def whole_answer(running: RunningRequest, call: GenerationCall, model: str, answer_class: type[AnswerT]) -> AnswerT:
    """Build the answer of a unary call; the request must be done without error."""
    completion = running.state.completion()
    return answer_class(
        request_id=running.request_id,
        model=model,
        outputs=[
            wire_results.output_to_proto(output, return_token_ids=call.return_token_ids)
            for output in completion.outputs
        ],
        usage=wire_results.usage_to_proto(completion.usage),
        prompt_token_ids=completion.prompt_token_ids if call.return_prompt_token_ids else (),
        prompt_logprobs=wire_results.logprobs_to_proto(completion.prompt_logprobs or ()),
    )
