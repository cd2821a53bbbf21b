"""How to reach a gateway; pure but for reading the certificate files."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from llama4_dist.errors import ConfigError

MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectOptions:
    """Credentials and patience. `timeout_s` bounds one call with all its retries; None leaves it to the server's cap.

    TLS is on as soon as one of its fields is set; `tls_server_name` is checked instead of the address's host.
    """

    token: str | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str | None = None
    timeout_s: float | None = None
    max_attempts: int = 8

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together: give both or neither")
        if self.max_attempts < 1:
            raise ConfigError(f"max_attempts={self.max_attempts} must be at least 1")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def uses_tls(self) -> bool:
        return self.tls or any((self.tls_ca, self.tls_certificate, self.tls_server_name))


def channel_credentials(options: ConnectOptions) -> grpc.ChannelCredentials:
    """Read the files into credentials; raise ConfigError if one cannot be read."""
    try:
        ca, key, certificate = (
            file.read_bytes() if file is not None else None
            for file in (options.tls_ca, options.tls_key, options.tls_certificate)
        )
    except OSError as error:
        raise ConfigError(f"TLS file {error.filename}: {error.strerror}") from None
    return grpc.ssl_channel_credentials(ca, key, certificate)


def channel_options(options: ConnectOptions) -> list[tuple[str, int | str]]:
    """Return the channel's arguments."""
    arguments: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if options.tls_server_name is not None:
        arguments.append(("grpc.ssl_target_name_override", options.tls_server_name))
    return arguments
