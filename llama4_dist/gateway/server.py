"""Assembles the gRPC server: transport limits, services, credentials; refuses to bind what it cannot protect."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from llama4_dist.errors import ConfigError
from llama4_dist.gateway.admission import Admission
from llama4_dist.gateway.auth import AuthInterceptor, Scope, read_tokens
from llama4_dist.gateway.early_refusal import AdmissionInterceptor
from llama4_dist.gateway.handlers import service_handler
from llama4_dist.gateway.health import Health
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.service import InferenceService
from llama4_dist.gateway.settings import GatewaySettings, is_loopback
from llama4_dist.gateway.tls import server_credentials
from llama4_dist.gateway.tokenizer_service import TokenizerService
from llama4_dist.gateway.transport_log import quieten_lost_statuses
from llama4_dist.v1 import inference_pb2, tokenizer_pb2

# A service and the object whose coroutines have the names of its methods (gateway.handlers).
Services = Mapping[ServiceDescriptor, object]
NO_SERVICES: Services = MappingProxyType({})
ADMIN_SERVICES = (
    "llama4_dist.v1.ClusterService",
    "llama4_dist.v1.ExpertService",
    "google.longrunning.Operations",
    "grpc.channelz.v1.Channelz",
)
EVERY_METHOD = ""  # the prefix of all
STREAMS_PER_CONNECTION = 1024
IDENTITY_ONLY = 1  # bit set of accepted message encodings: inflating a small bomb is never begun


def server_options(settings: GatewaySettings) -> list[tuple[str, int]]:
    """Bound everything a peer can make the transport do."""
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_response_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 32 * 1024),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ONLY),
        ("grpc.so_reuseport", int(settings.reuse_port)),  # unasked, two servers on one port would share it silently
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_connection_age_ms", round(settings.max_connection_age_s * 1000)),
        # A connection that ages out lets its longest generation finish.
        ("grpc.max_connection_age_grace_ms", round(settings.max_request_s * 1000)),
        ("grpc.server_handshake_timeout_ms", 10_000),
    ]


def build_server(
    settings: GatewaySettings,
    *,
    inference: InferenceService,
    tokenizer: TokenizerService,
    health: Health,
    metrics: Metrics,
    admission: Admission,
    extra_services: Services = NO_SERVICES,
) -> tuple[grpc.aio.Server, int]:
    """Build the server and bind its port; return both. `extra_services` are the caller's."""
    services: dict[ServiceDescriptor, object] = {
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]: inference,
        tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"]: tokenizer,
        **extra_services,
    }
    interceptors = [auth_interceptor(settings, metrics), AdmissionInterceptor(admission, metrics)]
    return assemble(settings, services, interceptors=interceptors, health=health, metrics=metrics)


def build_admin_server(
    settings: GatewaySettings, services: Services, *, health: Health, metrics: Metrics
) -> tuple[grpc.aio.Server, int]:
    """Build a server of which every method but health needs the admin scope, and bind its port."""
    return assemble(
        settings, services, interceptors=[admin_interceptor(settings, metrics)], health=health, metrics=metrics
    )


def assemble(
    settings: GatewaySettings,
    served: Services,
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor],
    health: Health,
    metrics: Metrics,
) -> tuple[grpc.aio.Server, int]:
    """Put services, health and reflection behind the interceptors and bind the port."""
    refuse_slow_protobuf()
    quieten_lost_statuses()
    server = grpc.aio.server(
        interceptors=interceptors,
        options=server_options(settings),
        # Calls beyond what admission refuses politely are refused by the transport.
        maximum_concurrent_rpcs=2 * settings.max_requests + 64,
    )
    services = {**served, health_pb2.DESCRIPTOR.services_by_name["Health"]: health}
    if settings.reflection:
        service = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
        names = [known.full_name for known in (*services, service)]
        services[service] = reflection.aio.ReflectionServicer(names)
    server.add_generic_rpc_handlers(
        tuple(service_handler(service, methods, metrics) for service, methods in services.items())
    )
    return server, bind(server, settings)


def auth_interceptor(settings: GatewaySettings, metrics: Metrics) -> AuthInterceptor:
    """Choose who may call: tokens if there is a file; else loopback is trusted, and mutual TLS for normal calls."""
    tokens = read_tokens(settings.token_file) if settings.token_file is not None else None
    default_scope = Scope.ADMIN if is_loopback(settings.address) and tokens is None else Scope.NORMAL
    prefixes = [f"/{service}/" for service in ADMIN_SERVICES]
    return AuthInterceptor(tokens, prefixes, default_scope, metrics)


def admin_interceptor(settings: GatewaySettings, metrics: Metrics) -> AuthInterceptor:
    """Ask for the admin scope everywhere. Without a token file loopback, or a certificate of this port's CA, is it."""
    tokens = read_tokens(settings.token_file) if settings.token_file is not None else None
    if tokens is not None and not tokens.cover(Scope.ADMIN):
        raise ConfigError(f"token_file {settings.token_file} lets nobody in here: add a line `admin TOKEN`")
    return AuthInterceptor(tokens, [EVERY_METHOD], Scope.ADMIN, metrics)


def bind(server: grpc.aio.Server, settings: GatewaySettings) -> int:
    """Bind the address; raise ConfigError if it is taken or not ours."""
    credentials = server_credentials(settings)
    try:
        if credentials is None:
            return server.add_insecure_port(settings.address)
        return server.add_secure_port(settings.address, credentials)
    except RuntimeError:
        raise ConfigError(f"address {settings.address} cannot be bound: is it taken, or not of this machine?") from None


def refuse_slow_protobuf() -> None:
    """Raise ConfigError under the pure-Python protobuf runtime, which recursion can exhaust (CVE-2025-4565)."""
    if api_implementation.Type() == "python":
        raise ConfigError("protobuf runs in pure Python: unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION")
