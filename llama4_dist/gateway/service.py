"""InferenceService: thin methods between the wire and the ledger of generations."""

import asyncio
import copy
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from llama4_dist.errors import DeadlineExceededError
from llama4_dist.gateway.admission import Admission
from llama4_dist.gateway.events import AnswerT, Event, EventReader, whole_answer
from llama4_dist.gateway.generations import Generations
from llama4_dist.gateway.handlers import Context
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.prompt import check_model
from llama4_dist.gateway.running import RunningRequest
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import EngineLimits
from llama4_dist.rpc.wire import GenerationCall, GenerationMessage, call_from_proto, invalid
from llama4_dist.rpc.wire_results import model_to_proto
from llama4_dist.v1 import inference_pb2, types_pb2

TRACE_KEY = "traceparent"
StreamMessage = inference_pb2.StreamGenerateRequest | inference_pb2.StreamChatRequest


class InferenceService:
    """The public methods; names are the service's own."""

    def __init__(
        self,
        generations: Generations,
        admission: Admission,
        metrics: Metrics,
        settings: GatewaySettings,
        limits: EngineLimits,
        *,
        has_tokenizer: bool,
    ) -> None:
        self._generations = generations
        self._admission = admission
        self._metrics = metrics
        self._settings = settings
        self._limits = limits
        self._model = model_to_proto(limits, has_tokenizer=has_tokenizer)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """Answer once, from a prompt."""
        return await self._answer(request, context, inference_pb2.GenerateResponse)

    async def StreamGenerate(self, request: inference_pb2.StreamGenerateRequest, context: Context) -> None:
        """Stream, from a prompt."""
        await self._stream(request, context, inference_pb2.StreamGenerateResponse)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> inference_pb2.ChatResponse:
        """Answer once, in a chat."""
        return await self._answer(request, context, inference_pb2.ChatResponse)

    async def StreamChat(self, request: inference_pb2.StreamChatRequest, context: Context) -> None:
        """Stream, in a chat."""
        await self._stream(request, context, inference_pb2.StreamChatResponse)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """List the one model; its page is the last."""
        if request.page_size < 0:
            raise invalid("page_size", f"{request.page_size} is negative: give 0 or more")
        if request.page_token:
            raise invalid("page_token", "was not given out by this server: start without one")
        return inference_pb2.ListModelsResponse(models=[self._model])

    async def GetModel(self, request: inference_pb2.GetModelRequest, context: Context) -> types_pb2.Model:
        """Return the model."""
        if not request.name:
            raise invalid("name", "is missing: use models/{model} as ListModels gives it")
        check_model(request.name, self._limits)
        return self._model

    async def _answer(self, message: GenerationMessage, context: Context, answer_class: type[AnswerT]) -> AnswerT:
        async with self._opened(message, context) as (running, call, note_begun):
            while not running.done:
                await running.changed()
                if running.begun:
                    note_begun()
            if running.error is not None:
                raise running.error
            self._metrics.streamed_tokens.inc(running.state.usage.completion_tokens)
            return whole_answer(running, call, self._model.name, answer_class)

    async def _stream(self, request: StreamMessage, context: Context, event_class: type[Event]) -> None:
        resume = tuple(request.resume.next_token_index) if request.HasField("resume") else None
        async with self._opened(request.request, context, resume) as (running, call, note_begun):
            reader = EventReader(running, call, self._model.name, event_class, resume)
            num_messages = 0
            try:
                while (events := reader.new_events()) or not running.done:
                    if not events:
                        await running.changed()
                        continue
                    if num_messages == 0:
                        note_begun()
                    for event in events:
                        await context.write(event)
                        num_messages += 1
            finally:
                self._metrics.stream_messages.inc(num_messages)  # once a stream: a metric has a lock
            self._metrics.streamed_tokens.inc(running.state.usage.completion_tokens)
            if running.error is not None:
                raise running.error

    @asynccontextmanager
    async def _opened(
        self, message: GenerationMessage, context: Context, resume: tuple[int, ...] | None = None
    ) -> AsyncIterator[tuple[RunningRequest, GenerationCall, Callable[[], None]]]:
        """Admit the call and run it under its deadline; without one, under the server's cap.

        The last of what it yields is to be called when the first token is there.
        """
        timeout_s = self._settings.max_request_s
        if (remaining_s := context.time_remaining()) is not None:
            timeout_s = min(timeout_s, remaining_s)
        with self._admission.enter() as note_begun, self._metrics.in_flight.track_inprogress():
            call = call_from_proto(message, self._settings.sampling)
            try:
                async with asyncio.timeout(timeout_s):
                    opening = self._generations.open(
                        call,
                        tenant=tenant_of(context),
                        body=digest(message),
                        timeout_s=timeout_s,
                        resume=resume,
                        trace=trace_of(context),
                    )
                    async with opening as running:
                        yield running, call, note_begun
            except TimeoutError:
                raise DeadlineExceededError(f"the request did not finish in {timeout_s:.3f} s") from None


def tenant_of(context: Context) -> str:
    """Name the caller by its credential, so that one tenant's request ids mean nothing to another."""
    credentials = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
    identities = [identity.hex() for identity in context.peer_identities() or ()]
    return hashlib.sha256("\n".join([*credentials, *identities]).encode()).hexdigest()


def trace_of(context: Context) -> str:
    """Return the W3C `traceparent` the caller sent, "" for none; nobody here reads it but who makes spans."""
    return next((str(value) for key, value in context.invocation_metadata() or () if key == TRACE_KEY), "")


def digest(message: GenerationMessage) -> bytes:
    """Digest what a request asks for: everything but its id."""
    content = copy.deepcopy(message)
    content.ClearField("request_id")
    kind = message.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(kind + b"\0" + content.SerializeToString(deterministic=True)).digest()
