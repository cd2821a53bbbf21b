"""A client of an admin server for the commands that show and change a cluster."""

from dataclasses import dataclass
from pathlib import Path

from llama4_dist.client.admin import AdminClient
from llama4_dist.client.options import ConnectOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """Where the admin server is and how a command answers."""

    server: str
    token: str | None = None
    tls_ca: Path | None = None
    as_json: bool = False

    def open(self) -> AdminClient:
        """Connect; a person at a terminal is told soon that nobody answers."""
        return AdminClient(self.server, ConnectOptions(token=self.token, tls_ca=self.tls_ca, max_attempts=3))
