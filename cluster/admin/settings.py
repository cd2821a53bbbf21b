"""What the admin server can be told, checked before its port is opened; knows no control plane."""

from dataclasses import dataclass
from pathlib import Path

from llama4_dist.errors import ConfigError
from llama4_dist.gateway.settings import GatewaySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSettings:
    """Times are seconds. Beyond loopback a token file or a client CA is needed; both are this port's own.

    With a token file only its `admin` tokens pass. Without one, loopback or a certificate of `tls_client_ca` does.
    """

    address: str = "127.0.0.1:0"
    token_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    reflection: bool = True
    num_threads: int = 8  # calls to the control plane at once
    call_timeout_s: float = 60.0  # for one such call
    watch_interval_s: float = 0.5  # how often watched things are read, however many watch
    max_calls: int = 256  # open at once, streams included

    def __post_init__(self) -> None:
        for name in ("num_threads", "call_timeout_s", "watch_interval_s", "max_calls"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        _ = self.transport

    @property
    def transport(self) -> GatewaySettings:
        """The same as settings of a gateway's transport, which refuses what is unsafe."""
        return GatewaySettings(
            address=self.address,
            token_file=self.token_file,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            tls_client_ca=self.tls_client_ca,
            reflection=self.reflection,
            max_message_bytes=64 * 1024,
            max_requests=self.max_calls,
        )
