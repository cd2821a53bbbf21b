"""The head of Ray is killed: what runs goes on, changes are refused until it is back, and closing ends everything."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]

# A Ray of its own in a process of its own: the head is not shared with other tests.
DRIVER = """
import sys, time
from pathlib import Path
import psutil
from cluster.ray_engine import RayEngine
from cluster.worker import State
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import UnavailableError
from tests.cluster.running import Collector, reference, some_requests

model = Path(sys.argv[1])
engine = RayEngine(model, num_expert_hosts=2, options=EngineOptions(num_blocks=128, max_num_seqs=8))
collector = Collector()
engine.start(collector.collect)
running, later = some_requests("running", max_tokens=60), some_requests("later")
expected = reference(model, [*running, *later])
for request in running:
    engine.submit(request)
collector.wait_for_tokens("running0", 2)
(head,) = [one for one in psutil.Process().children(recursive=True) if one.name() == "gcs_server"]
head.kill()
head.wait(60)
got = collector.run(engine, later)
collector.wait_for([request.request_id for request in running])
got |= {request.request_id: tuple(collector.tokens[request.request_id]) for request in running}
assert got == expected, "tokens changed"
assert all(one.state is State.READY for one in engine.control.view().workers), "the controller does not answer"
try:
    engine.control.scale(3)
    raise SystemExit("scaling was accepted without a head")
except UnavailableError as error:
    assert error.reason == "HEAD_LOST", error.reason
    assert error.retry_after_s
(host,) = [one for one in engine.control.view().workers if one.worker == "expert-1"]
psutil.Process(host.pid).kill()
again = some_requests("again")
assert collector.run(engine, again) == reference(model, again), "a host that died after the head cost tokens"
print("served", flush=True)
engine.close()
print("closed", flush=True)
"""


@pytest.mark.timeout(240)
def test_serving_outlives_the_head_and_changes_are_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "scout")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="l4d-") as folder:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(model)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"TMPDIR": folder},
            cwd=ROOT,
        )
        try:
            assert driver.stdout is not None
            said = driver.stdout.readline()
            family = psutil.Process(driver.pid).children(recursive=True) if said else []
            rest, errors = driver.communicate(timeout=200)
            assert said + rest == "served\nclosed\n", errors[-2000:]
            assert driver.returncode == 0
            _, alive = psutil.wait_procs(family, timeout=30)
            assert [one.name() for one in alive] == []
        finally:
            if driver.poll() is None:
                driver.send_signal(signal.SIGKILL)
                driver.wait(60)
