"""Two machines, as far as the network can tell: a Ray node in each of two network namespaces, rows over their cable."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.cluster.running import reference, some_requests

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 6399
ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=4"]
NODES = (
    ["--head", f"--port={PORT}", "--include-dashboard=false", '--resources={"llama4_attention": 1}'],
    [f"--address={ADDRESSES[0]}:{PORT}", '--resources={"llama4_expert": 2}'],
)

DRIVER = f"""
import dataclasses, json, sys
import ray
from cluster.ray_engine import RayEngine
from llama4_dist.engine.options import EngineOptions
from tests.cluster.running import Collector, some_requests
engine = RayEngine(
    sys.argv[1], num_expert_hosts=2, ray_address="{ADDRESSES[0]}:{PORT}", options=EngineOptions(num_blocks=128)
)
collector = Collector()
engine.start(collector.collect)
tokens = collector.run(engine, some_requests("n"))
stats, status = engine.stats(), engine.status()
addresses = {{worker.worker: worker.addresses for worker in status}}
engine.close()
print(json.dumps([tokens, addresses, dict(stats.host_bytes_out)]))
"""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two namespaces with one cable between them."""
    names = (f"l4a-{secrets.token_hex(3)}", f"l4b-{secrets.token_hex(3)}")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2: the test of TCP links between machines did not run")
    try:
        run("ip", "netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(
            f"this kernel permits no network namespace ({error.stderr.strip()}): TCP between machines not tested"
        )
    try:
        run("ip", "netns", "add", names[1])
        run("ip", "link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
            run("ip", "-n", name, "link", "set", "veth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """The environment of both nodes and the driver: one token, one short temporary folder."""
    folder = tempfile.mkdtemp(prefix="l4n-")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield kept | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        "TMPDIR": folder,
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_metrics_collection": "0",
    }
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two_machines(namespaces: tuple[str, str], environment: dict[str, str]) -> Iterator[str]:
    """A Ray of two nodes; yield the namespace of the first."""
    with ExitStack() as nodes:
        for name, address, options in zip(namespaces, ADDRESSES, NODES, strict=True):
            command = ["ip", "netns", "exec", name, *RAY, f"--node-ip-address={address}", *options]
            command += ["--object-store-memory=80000000"]
            node = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            nodes.callback(node.wait, 20)
            nodes.callback(node.terminate)
            assert node.stdout is not None
            deadline = time.monotonic() + 30
            while "Ray runtime started" not in (line := node.stdout.readline()):
                assert line, f"the Ray node ended with {node.wait(60)}"
                assert time.monotonic() < deadline
        yield namespaces[0]


def received_bytes(namespace: str) -> int:
    link = json.loads(run("ip", "-n", namespace, "-j", "-s", "link", "show", "veth0"))
    return int(link[0]["stats64"]["rx"]["bytes"])


def test_rows_cross_from_machine_to_machine_and_the_tokens_stay(
    two_machines: str, namespaces: tuple[str, str], environment: dict[str, str], tmp_path: Path
) -> None:
    model_dir = make_checkpoint(tmp_path, "scout")
    before = received_bytes(namespaces[1])
    driver = subprocess.run(
        ["ip", "netns", "exec", two_machines, sys.executable, "-c", DRIVER, str(model_dir)],
        env=environment, capture_output=True, text=True, timeout=90, check=False, cwd=ROOT,
    )  # fmt: skip
    assert driver.returncode == 0, driver.stderr[-3000:]
    tokens, addresses, bytes_out = json.loads(driver.stdout.splitlines()[-1])
    requests = some_requests("n")
    assert {name: tuple(ids) for name, ids in tokens.items()} == reference(model_dir, requests)
    assert addresses["attention-0"][0].startswith(ADDRESSES[0] + ":")
    for host in ("expert-0", "expert-1"):
        assert addresses[host][1].startswith(f"tcp:{ADDRESSES[1]}:")
    num_rows = 4 * sum(len(request.prompt_token_ids) + 11 for request in requests)
    assert sum(bytes_out.values()) == num_rows * 64 * 4
    assert received_bytes(namespaces[1]) - before > sum(bytes_out.values())
