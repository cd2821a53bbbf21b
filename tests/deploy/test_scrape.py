"""A gateway's metrics as the ServiceMonitor reads them: with the token of the Secret, and not without."""

import urllib.error
import urllib.request
from pathlib import Path

from llama4_dist.gateway.settings import GatewaySettings
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import serving
from tests.gateway.test_auth import NORMAL, OTHER, write_tokens


def status(port: int | None, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
        ) as page:
            return int(page.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_a_token_of_the_file_opens_the_page(tmp_path: Path) -> None:
    file = write_tokens(tmp_path, f"{NORMAL}\n")
    settings = GatewaySettings(metrics_address="127.0.0.1:0", metrics_token_file=file)
    with serving(ScriptedEngine(), settings=settings) as served:
        port = served.gateway.metrics_port
        assert [status(port, token) for token in (None, OTHER, NORMAL)] == [401, 401, 200]
