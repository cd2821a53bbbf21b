"""What all commands take that speak to an admin server, and a client made of it; the client is imported when used."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama4_dist.cli.flags import AdminAddress, DrainTimeout, DryRun, JsonFlag, NoWait, RequestId, TlsCa, Token

if TYPE_CHECKING:
    from llama4_dist.client.admin import AdminClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """Where the admin server is and how a command answers."""

    server: AdminAddress
    token: Token = None
    tls_ca: TlsCa = None
    as_json: JsonFlag = False

    def open(self) -> "AdminClient":
        """Connect; a person at a terminal is told soon that nobody answers."""
        from llama4_dist.client.admin import AdminClient
        from llama4_dist.client.options import ConnectOptions

        return AdminClient(self.server, ConnectOptions(token=self.token, tls_ca=self.tls_ca, max_attempts=3))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeFlags:
    """How a change of the cluster is asked for."""

    dry_run: DryRun = False
    no_wait: NoWait = False
    request_id: RequestId = ""
    drain_timeout: DrainTimeout = None
