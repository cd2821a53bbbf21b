"""What the gateway can be told, checked for contradictions before any port is opened."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from llama4_dist.errors import ConfigError
from llama4_dist.request import Sampling
from llama4_dist.settings import host_and_port

MIN_KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Sizes are bytes, times seconds. `sampling` holds the model's generation defaults.

    Gateways of the same workers and the same `engine_id_key` (derived in `engine_ids`) resume each other's streams.
    """

    address: str = "127.0.0.1:50051"
    token_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    reuse_port: bool = False  # share the port with other gateways of this user; the kernel deals out connections
    reflection: bool = True
    metrics_address: str | None = None
    metrics_token_file: Path | None = None
    max_message_bytes: int = 4 * 1024 * 1024
    max_response_bytes: int = 64 * 1024 * 1024
    max_requests: int = 4096  # in the gateway at once; the engine bounds its own queue besides
    max_queue_s: float | None = None  # refuse a request that would wait longer for its first token
    max_request_s: float = 600.0
    max_queue_age_s: float = 60.0  # older waiting requests than this turn readiness off
    unready_after_failure_s: float = 5.0  # readiness stays off this long after a request ended as unavailable
    drain_timeout_s: float = 30.0
    max_connection_age_s: float = 1800.0
    sampling: Sampling = field(default_factory=Sampling)
    engine_id_key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.engine_id_key is not None and len(self.engine_id_key) < MIN_KEY_BYTES:
            raise ConfigError(f"engine_id_key has {len(self.engine_id_key)} bytes: derive it from the cluster secret")
        if self.max_queue_s is not None and not self.max_queue_s > 0:
            raise ConfigError(f"max_queue_s={self.max_queue_s} must be above 0: leave it out to bound only the number")
        for address in filter(None, (self.address, self.metrics_address)):
            host_and_port(address)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ConfigError("tls_client_ca needs tls_certificate and tls_key")
        if not is_loopback(self.address) and self.token_file is None and self.tls_client_ca is None:
            raise ConfigError(
                f"address {self.address} is reachable from other machines: give token_file or tls_client_ca, "
                "or bind 127.0.0.1"
            )
        if self.metrics_address is not None and not is_loopback(self.metrics_address) and not self.metrics_token_file:
            raise ConfigError(
                f"metrics_address {self.metrics_address} is reachable from other machines: give metrics_token_file, or "
                "a loopback address, e.g. 127.0.0.1:9100"
            )


def is_loopback(address: str) -> bool:
    """Tell whether only this machine can reach the address; a name other than localhost counts as not."""
    host, _ = host_and_port(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
