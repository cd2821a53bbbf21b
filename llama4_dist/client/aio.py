"""The asyncio client; reads like the blocking one."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llama4_dist.client.options import ConnectOptions, channel_credentials, channel_options
from llama4_dist.client.results import Assembler, Delta, ModelCard, completion, model_card
from llama4_dist.client.retry import Attempts
from llama4_dist.errors import DeadlineExceededError, UnavailableError
from llama4_dist.request import Completion, Message, Prompt, Sampling
from llama4_dist.rpc import status
from llama4_dist.rpc.wire import chat_to_proto, generate_to_proto, messages_to_proto, sendable
from llama4_dist.v1 import inference_pb2, inference_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc

POLL_S = 0.05


class AsyncCompletionStream:
    """Iterates over deltas; `completion` is the whole answer once they are exhausted. Leaving early cancels."""

    def __init__(self, open_call: Callable[[float | None], Any], attempts: Attempts, sampling: Sampling | None) -> None:
        self._assembler = Assembler(sampling)
        self._deltas = self._run(open_call, attempts)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas

    async def close(self) -> None:
        """Cancel the request if it still runs."""
        await self._deltas.aclose()

    @property
    def request_id(self) -> str:
        """The request's id; "" before the first delta."""
        return self._assembler.request_id

    @property
    def completion(self) -> Completion:
        """The whole answer; EngineError before the stream's end."""
        return self._assembler.completion

    async def _run(self, open_call: Callable[[float | None], Any], attempts: Attempts) -> AsyncGenerator[Delta, None]:
        begun = False
        while True:
            call = open_call(attempts.remaining_s)
            try:
                async for event in call:
                    begun = True
                    delta = self._assembler.feed(event)
                    if delta is not None:
                        yield delta
                return
            except grpc.RpcError as failure:
                delay_s = attempts.delay_s(failure, begun=begun)
            finally:
                call.cancel()
            await asyncio.sleep(delay_s)


class AsyncClient:
    """Calls a gateway at "host:port". Every method raises the errors of `llama4_dist.errors`.

    Overload and unavailability are retried before the first token, as the server asks. A request id is drawn here when
    none is given, so a retry joins the request it repeats instead of running it twice.
    """

    def __init__(self, address: str, options: ConnectOptions | None = None) -> None:
        self._options = options or ConnectOptions()
        arguments = channel_options(self._options)
        self._channel = (
            grpc.aio.secure_channel(address, channel_credentials(self._options), arguments)
            if self._options.uses_tls
            else grpc.aio.insecure_channel(address, arguments)
        )
        self._inference: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._tokenizer: Any = tokenizer_pb2_grpc.TokenizerServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Completion:
        """Generate from text or token ids; `sampling` None takes the server's defaults."""
        request = generate_to_proto(
            prompt, sampling, model=model, request_id=request_id or uuid.uuid4().hex, priority=priority
        )
        return completion(await self._call(self._inference.Generate, request, timeout_s), sampling)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Completion:
        """Generate the next message of a chat."""
        request = chat_to_proto(
            messages, sampling, model=model, request_id=request_id or uuid.uuid4().hex, priority=priority
        )
        return completion(await self._call(self._inference.Chat, request, timeout_s), sampling)

    def stream_generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncCompletionStream:
        """Generate from text or token ids, as tokens come."""
        request = generate_to_proto(
            prompt, sampling, model=model, request_id=request_id or uuid.uuid4().hex, priority=priority
        )
        wrapped = inference_pb2.StreamGenerateRequest(request=request)
        return self._stream(self._inference.StreamGenerate, wrapped, sampling, timeout_s)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncCompletionStream:
        """Generate the next message of a chat, as tokens come."""
        request = chat_to_proto(
            messages, sampling, model=model, request_id=request_id or uuid.uuid4().hex, priority=priority
        )
        wrapped = inference_pb2.StreamChatRequest(request=request)
        return self._stream(self._inference.StreamChat, wrapped, sampling, timeout_s)

    async def list_models(self) -> tuple[ModelCard, ...]:
        """List the models served."""
        found: list[ModelCard] = []
        token = ""
        while True:
            page = await self._call(self._inference.ListModels, inference_pb2.ListModelsRequest(page_token=token), None)
            found.extend(model_card(model) for model in page.models)
            token = page.next_page_token
            if not token:
                return tuple(found)

    async def get_model(self, name: str) -> ModelCard:
        """Return one model; NotFoundError if it is not served."""
        return model_card(await self._call(self._inference.GetModel, inference_pb2.GetModelRequest(name=name), None))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Encode text."""
        request = tokenizer_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return tuple((await self._call(self._tokenizer.Tokenize, request, None)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode tokens."""
        with sendable():
            request = tokenizer_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return str((await self._call(self._tokenizer.Detokenize, request, None)).text)

    async def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Render a chat as tokens."""
        request = tokenizer_pb2.ApplyChatTemplateRequest(
            messages=messages_to_proto(messages), add_generation_prompt=add_generation_prompt
        )
        return tuple((await self._call(self._tokenizer.ApplyChatTemplate, request, None)).token_ids)

    async def health(self, service: str = "readiness", *, timeout_s: float = 5.0) -> bool:
        """Tell whether a condition holds: liveness, readiness or startup. Raises if the gateway cannot be asked."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as failure:
            raise status.from_rpc_error(failure) from None
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until the gateway is ready; UnavailableError if it is not in time."""
        deadline_s = time.monotonic() + timeout_s
        while (remaining_s := deadline_s - time.monotonic()) > 0:
            try:
                if await self.health(timeout_s=remaining_s):
                    return
            except (UnavailableError, DeadlineExceededError):
                pass  # not listening yet
            await asyncio.sleep(POLL_S)
        raise UnavailableError(f"the gateway is not ready after {timeout_s} s", reason="NOT_READY")

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        attempts = Attempts(self._options, timeout_s)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_s, metadata=self._options.metadata)
            except grpc.RpcError as failure:
                delay_s = attempts.delay_s(failure, begun=False)
            await asyncio.sleep(delay_s)

    def _stream(
        self, method: Any, request: Any, sampling: Sampling | None, timeout_s: float | None
    ) -> AsyncCompletionStream:
        def open_call(remaining_s: float | None) -> Any:
            return method(request, timeout=remaining_s, metadata=self._options.metadata)

        return AsyncCompletionStream(open_call, Attempts(self._options, timeout_s), sampling)
