"""The blocking client."""

import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from llama4_dist.client.endpoints import Endpoints
from llama4_dist.client.options import ConnectOptions, channel_credentials, channel_options
from llama4_dist.client.progress import Progress, StreamMessage
from llama4_dist.client.results import ModelCard, completion, model_card
from llama4_dist.client.retry import Attempts, is_lost, may_retry
from llama4_dist.client.streams import CompletionStream
from llama4_dist.errors import DeadlineExceededError, Llama4Error, UnavailableError
from llama4_dist.request import Completion, Message, Prompt, Sampling
from llama4_dist.rpc import status
from llama4_dist.rpc.wire import chat_to_proto, generate_to_proto, messages_to_proto, sendable
from llama4_dist.v1 import inference_pb2, tokenizer_pb2

POLL_S = 0.05


class Client:
    """Calls gateways at "host:port,host:port". Every method raises the errors of `llama4_dist.errors`.

    Overload and unavailability are retried as the server asks, on the next gateway where there is one; a stream that
    breaks goes on where it stopped. A request id is drawn here when none is given, so a retry joins the request it
    repeats instead of running it twice.
    """

    def __init__(self, address: str | Sequence[str], options: ConnectOptions | None = None) -> None:
        self._options = options or ConnectOptions()
        self._endpoints = Endpoints(address, self._open_channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; running calls are cancelled."""
        for endpoint in self._endpoints.all:
            endpoint.channel.close()

    def generate(
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
        return completion(self._call("inference", "Generate", request, timeout_s), sampling)

    def chat(
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
        return completion(self._call("inference", "Chat", request, timeout_s), sampling)

    def stream_generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> CompletionStream:
        """Generate from text or token ids, as tokens come."""
        request = generate_to_proto(
            prompt, sampling, model=model, request_id=request_id or uuid.uuid4().hex, priority=priority
        )
        wrapped = inference_pb2.StreamGenerateRequest(request=request)
        return self._stream("StreamGenerate", wrapped, sampling, timeout_s)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> CompletionStream:
        """Generate the next message of a chat, as tokens come."""
        request = chat_to_proto(
            messages, sampling, model=model, request_id=request_id or uuid.uuid4().hex, priority=priority
        )
        wrapped = inference_pb2.StreamChatRequest(request=request)
        return self._stream("StreamChat", wrapped, sampling, timeout_s)

    def list_models(self) -> tuple[ModelCard, ...]:
        """List the models served."""
        found: list[ModelCard] = []
        token = ""
        while True:
            page = self._call("inference", "ListModels", inference_pb2.ListModelsRequest(page_token=token), None)
            found.extend(model_card(model) for model in page.models)
            token = page.next_page_token
            if not token:
                return tuple(found)

    def get_model(self, name: str) -> ModelCard:
        """Return one model; NotFoundError if it is not served."""
        return model_card(self._call("inference", "GetModel", inference_pb2.GetModelRequest(name=name), None))

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Encode text."""
        request = tokenizer_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return tuple(self._call("tokenizer", "Tokenize", request, None).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode tokens."""
        with sendable():
            request = tokenizer_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return str(self._call("tokenizer", "Detokenize", request, None).text)

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Render a chat as tokens."""
        request = tokenizer_pb2.ApplyChatTemplateRequest(
            messages=messages_to_proto(messages), add_generation_prompt=add_generation_prompt
        )
        return tuple(self._call("tokenizer", "ApplyChatTemplate", request, None).token_ids)

    def health(self, service: str = "readiness", *, timeout_s: float = 5.0) -> bool:
        """Tell whether a condition holds: liveness, readiness or startup. Raises if no gateway can be asked."""
        request = health_pb2.HealthCheckRequest(service=service)
        refusal: Llama4Error = UnavailableError("no gateway can be asked")
        for _ in self._endpoints.all:
            endpoint = self._endpoints.current
            try:
                answer = endpoint.health.Check(request, timeout=timeout_s)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
            except grpc.RpcError as failure:
                refusal = status.from_rpc_error(failure)
            if not is_lost(refusal):
                break
            self._endpoints.pass_over(endpoint)
        raise refusal

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until the gateway is ready; UnavailableError if it is not in time."""
        self.wait_for("readiness", timeout_s)

    def wait_for(self, service: str, timeout_s: float) -> None:
        """Wait until a condition holds; UnavailableError if it does not in time."""
        deadline_s = time.monotonic() + timeout_s
        while (remaining_s := deadline_s - time.monotonic()) > 0:
            try:
                if self.health(service, timeout_s=remaining_s):
                    return
            except (UnavailableError, DeadlineExceededError):
                pass  # not listening yet
            time.sleep(POLL_S)
        raise UnavailableError(f"the gateway is not ready: {service} is off after {timeout_s} s", reason="NOT_READY")

    def _call(self, service: str, method: str, request: Any, timeout_s: float | None) -> Any:
        attempts = Attempts(self._options, timeout_s, len(self._endpoints))
        while True:
            endpoint = self._endpoints.current
            call = getattr(getattr(endpoint, service), method)
            try:
                return call(request, timeout=attempts.remaining_s, metadata=self._options.metadata)
            except grpc.RpcError as failure:
                error = status.from_rpc_error(failure)
            if is_lost(error):
                self._endpoints.pass_over(endpoint)
            time.sleep(attempts.delay_after(error, retriable=may_retry(error)))

    def _stream(
        self, method: str, message: StreamMessage, sampling: Sampling | None, timeout_s: float | None
    ) -> CompletionStream:
        attempts = Attempts(self._options, timeout_s, len(self._endpoints))

        def open_call(stream: Any, request: StreamMessage) -> Any:
            return stream(request, timeout=attempts.remaining_s, metadata=self._options.metadata)

        return CompletionStream(self._endpoints, method, Progress(message, sampling, attempts), open_call)

    def _open_channel(self, address: str) -> Any:
        arguments = channel_options(self._options)
        if self._options.uses_tls:
            return grpc.secure_channel(address, channel_credentials(self._options), arguments)
        return grpc.insecure_channel(address, arguments)
