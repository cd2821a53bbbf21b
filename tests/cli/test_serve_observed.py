"""`serve` without clients of its own: metrics of the whole cluster on its port, and objects for log lines."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.scraping import scrape
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


def test_a_cluster_without_a_gateway_is_scraped_too(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path / "scout", "scout")
    arguments = [
        "serve", "--model", str(model_dir), "--experts", "1", "--no-gateway", "--expert-metrics", "--json",
        "--directory-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0",
        "--log-format", "json", "--num-threads", "1",
    ]  # fmt: skip
    secret = tmp_path / "secret"
    secret.write_text("ab" * 32)
    secret.chmod(0o600)
    with (tmp_path / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", "from llama4_dist.cli import main; main()", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "LLAMA4_DIST_CLUSTER_SECRET_FILE": str(secret)},
        )
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline() or "{}")
            errors.seek(0)
            assert ready.get("event") == "ready", errors.read()[-2000:]
            assert ready["address"] is None
            port = int(ready["metrics_address"].rpartition(":")[2])
            wait_until(lambda: scrape(port).all("worker_up") == [1.0, 1.0], lambda: scrape(port).samples)
            found = scrape(port)
            assert found.value("engines") == 1.0
            assert found.value("engine_up", worker="attention-0") == 1.0
            assert found.value("placement_epoch") == 1.0
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        errors.seek(0)
        own = [json.loads(line) for line in errors if line.startswith("{")]
    assert [line["role"] for line in own if line["event"] == "admin_serving"] == ["gateway"]
