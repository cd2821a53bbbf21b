"""Binds a protobuf service to Python methods: parses, answers every failure as a status, hides what is private.

gRPC's own deserialiser answers INTERNAL for bytes that are no message, so methods get raw bytes here and the parsing
is ours. A field this server does not know is refused: ignoring it would silently answer another question.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor, message, message_factory

from llama4_dist.errors import FieldViolation, InvalidRequestError, Llama4Error, RequestCancelledError
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.rpc import status

if TYPE_CHECKING:  # generic in the type stubs only
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
else:
    Context = grpc.aio.ServicerContext
    Handler = grpc.RpcMethodHandler
Unary = Callable[[Any, Context], Awaitable[message.Message]]
Dialogue = Callable[[AsyncIterator[Any], Context], AsyncIterator[message.Message]]
Streaming = Callable[[Any, Context], Awaitable[None]]  # writes its answers to the context


def service_handler(service: descriptor.ServiceDescriptor, methods: object, metrics: Metrics) -> grpc.GenericRpcHandler:
    """Bind every method of `service` to the method of the same name; one that is missing stays UNIMPLEMENTED."""
    handlers = {}
    for method in service.methods:
        implementation = getattr(methods, method.name, None)
        if implementation is None:
            continue
        request_class = message_factory.GetMessageClass(method.input_type)
        if method.client_streaming:
            bind: Callable[..., Handler] = dialogue_handler
        else:
            bind = streaming_handler if method.server_streaming else unary_handler
        handlers[method.name] = bind(implementation, request_class, metrics, f"{service.name}/{method.name}")
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def unary_handler(method: Unary, request_class: type[message.Message], metrics: Metrics, name: str) -> Handler:
    """Wrap a method that answers once."""

    async def call(data: bytes, context: Context) -> message.Message:
        started_s = time.monotonic()
        try:
            answer = await method(parse(request_class, data), context)
        except Exception as error:  # noqa: BLE001 (the boundary: nothing unforeseen may reach a client)
            await refuse(error, context, metrics, name)
        metrics.observe_call(name, "OK", time.monotonic() - started_s)
        return answer

    return grpc.unary_unary_rpc_method_handler(call, response_serializer=serialize)


def streaming_handler(method: Streaming, request_class: type[message.Message], metrics: Metrics, name: str) -> Handler:
    """Wrap a method that answers with a stream."""

    async def call(data: bytes, context: Context) -> None:
        started_s = time.monotonic()
        try:
            await method(parse(request_class, data), context)
        except Exception as error:  # noqa: BLE001 (as above)
            await refuse(error, context, metrics, name)
        metrics.observe_call(name, "OK", time.monotonic() - started_s)

    return grpc.unary_stream_rpc_method_handler(call, response_serializer=serialize)


def dialogue_handler(method: Dialogue, request_class: type[message.Message], metrics: Metrics, name: str) -> Handler:
    """Wrap a method that answers a stream of requests with a stream."""

    async def call(requests: AsyncIterator[bytes], context: Context) -> None:
        started_s = time.monotonic()
        try:
            async for answer in method((parse(request_class, data) async for data in requests), context):
                await context.write(answer)
        except Exception as error:  # noqa: BLE001 (as above)
            await refuse(error, context, metrics, name)
        metrics.observe_call(name, "OK", time.monotonic() - started_s)

    return grpc.stream_stream_rpc_method_handler(call, response_serializer=serialize)


def serialize(answer: message.Message) -> bytes:
    """Encode an answer."""
    return answer.SerializeToString()


def parse(request_class: type[message.Message], data: bytes) -> Any:
    """Decode a request; raise InvalidRequestError for bytes that are no such message and for unknown fields."""
    request = request_class()
    try:
        request.ParseFromString(data)
    except message.DecodeError:
        raise malformed("is no valid message of its type") from None
    size = request.ByteSize()
    request.DiscardUnknownFields()
    if request.ByteSize() != size:
        raise malformed("has fields this server does not know; use a client of the server's version or older")
    return request


def malformed(description: str) -> InvalidRequestError:
    """Build the error of a request that cannot be read."""
    return InvalidRequestError([FieldViolation(field="request", description=description)])


async def refuse(error: Exception, context: Context, metrics: Metrics, name: str) -> None:
    """End the call with the error's status; never returns."""
    if isinstance(error, grpc.aio.InternalError):
        # The transport could not take an answer: the caller is gone, or it would be above max_response_bytes.
        error = RequestCancelledError("the answer could not be sent")
    shown: Llama4Error = status.public(error)
    answer = status.to_status(shown)
    code = status.code_of(shown)
    metrics.observe_refusal(name, code.name, shown.reason)
    await context.abort(code, answer.message, status.trailing_metadata(shown, answer))
