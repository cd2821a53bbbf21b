"""FX38 in small: random kills and stops of hosts that are started anew; every token is right and nothing is left."""

import gc
import os
import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from llama4_dist.chaos.faults.processes import Kill, Stop
from llama4_dist.dispatch.suspects import LONGEST_S
from tests.faults.leaks import LAZY_POOLS, assert_no_leaks, snapshot
from tests.matrix.conftest import Cases
from tests.matrix.harness import Cluster, Spec
from tests.matrix.hosts import Nursery

NUM_BLOWS = 20
EVERY_S = 1.0
OF_OTHER_RUNS = "temporary */llama4-*"  # this test makes no such folder; a Ray beside it does
SEED = int(os.environ.get("CHAOS_SEED", "20"))


@pytest.mark.slow
def test_twenty_random_blows_in_twenty_seconds_cost_no_token_and_leave_nothing(
    nursery: Nursery, model_dir: Path, cases: Cases, tmp_path_factory: pytest.TempPathFactory
) -> None:
    print(f"CHAOS_SEED={SEED}")
    gc.collect()  # what other tests let go of is not to be counted
    before = snapshot()
    run_dir = tmp_path_factory.mktemp("m") / "run"
    with ExitStack() as stack:
        strike(Cluster(nursery, Spec(num_hosts=4), model_dir=model_dir, run_dir=run_dir, resources=stack), cases)
    gc.collect()
    assert_no_leaks(before, ignore=(*LAZY_POOLS, OF_OTHER_RUNS))


def strike(cluster: Cluster, cases: Cases) -> None:
    draw = random.Random(SEED)
    load = cluster.start().load(cases.requests, cases.reference).start()
    begun_s = time.monotonic()
    for number in range(NUM_BLOWS):
        time.sleep(max(0.0, begun_s + number * EVERY_S - time.monotonic()))
        name = draw.choice(sorted(cluster.hosts))
        if draw.random() < 0.5:
            with load.history.fault(Kill(cluster.hosts[name].pid), phase=f"blow {number}"):
                cluster.respawn(name)
        else:
            with load.history.fault(Stop(cluster.hosts[name].pid), phase=f"blow {number}"):
                time.sleep(draw.uniform(0.1, 0.6))
    for name in sorted(cluster.hosts):
        cluster.wait_until_used(name, LONGEST_S + 4.0)
    verdict = load.end(label="FX38")
    assert verdict.added_stall.max_s < 2.0
    assert len(verdict.faults) == NUM_BLOWS
    assert all(effect.fault.is_verified for effect in verdict.faults)
