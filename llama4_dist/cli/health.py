"""`llama4-dist health`: one condition of a gateway or an admin port as an exit code; what probes and scripts ask."""

from pathlib import Path

from llama4_dist.cli.output import EXIT_UNAVAILABLE, console, fail, print_json, reporting
from llama4_dist.client import Client, ConnectOptions

DEFAULT_TIMEOUT_S = 5.0


def run_health(
    server: str, condition: str, *, tls_ca: Path | None, tls_server_name: str | None, wait_s: float, as_json: bool
) -> None:
    """Say whether the condition holds; leave with 4 where it does not, or nobody answers."""
    with reporting(as_json):
        options = ConnectOptions(tls_ca=tls_ca, tls_server_name=tls_server_name)
        with Client(server, options) as client:
            if wait_s:
                client.wait_for(condition, wait_s)
            serving = client.health(condition, timeout_s=DEFAULT_TIMEOUT_S)
    if not serving:
        message = f"{condition or 'the server'} at {server} is off"
        fail(message, reason="NOT_SERVING", code=EXIT_UNAVAILABLE, as_json=as_json)
    if as_json:
        print_json({"server": server, "condition": condition, "serving": True})
    else:
        console.print(f"{condition or 'the server'} at {server} is on", markup=False, highlight=False)
