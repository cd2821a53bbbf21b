"""FX1, FX2, FX39 where experts are cut: a slice is lost, adopted and checked by itself, and no token changes."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llama4_dist.chaos.faults.processes import Kill
from llama4_dist.errors import HandshakeError
from tests.cluster.running import reference
from tests.matrix.conftest import Cases
from tests.matrix.harness import Cluster
from tests.matrix.hosts import KillAt
from tests.matrix.load import reference_of
from tests.matrix.test_wrong_answers import Lie

MAX_STALL_S = 1.0
WARM = 8
SLICES = 2
Make = Callable[..., Cluster]


@pytest.fixture(scope="module")
def cut(cases: Cases, model_dir: Path) -> Cases:
    """What one process with as many slices answers."""
    said = reference(model_dir, cases.requests, expert_slices=SLICES)
    answers = reference_of(cases.requests, [said[request.request_id] for request in cases.requests])
    return Cases(requests=cases.requests, reference=replace(answers, events=cases.reference.events))


def test_a_host_that_dies_leaves_every_expert_whole(make: Make, cut: Cases) -> None:
    cluster = make(expert_slices=SLICES).start()
    load = cluster.load(cut.requests, cut.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(KillAt(cluster.hosts["expert-1"], "computing", after=3), phase="decode"):
        load.wait_for_tokens(WARM)
    assert load.end(label="FX1 slices").added_stall.max_s < MAX_STALL_S
    assert cluster.num_adopted == 0, "every slice has a second copy"


def test_the_slices_that_only_a_dead_host_held_are_adopted_and_no_others(make: Make, cut: Cases) -> None:
    cluster = make(num_hosts=3, num_replicas=1, expert_slices=SLICES).start()
    load = cluster.load(cut.requests, cut.reference).start()
    load.wait_for_tokens(WARM)
    lost = set(cluster.placement.held_by("expert-1"))
    with load.history.fault(Kill(cluster.hosts["expert-1"].pid)):
        load.wait_for_tokens(WARM)
    assert load.end(label="FX2 slices").added_stall.max_s < MAX_STALL_S
    held = {name: set(cluster.placement.held_by(name)) for name in ("expert-0", "expert-2")}
    computed = {
        (layer, unit)
        for name, own in held.items()
        for layer, unit, _ in cluster.hosts[name].stats["rows"]
        if (layer, unit) not in own
    }
    assert computed
    assert computed <= lost
    assert cluster.num_adopted >= len(computed)


def test_a_wrong_slice_is_found_by_comparison_and_its_host_barred(make: Make, cut: Cases) -> None:
    cluster = make(cross_check_every=8, expert_slices=SLICES).start()
    load = cluster.load(cut.requests, cut.reference).start()
    load.wait_for_tokens(WARM)
    lie = Lie(cluster.hosts["expert-1"], "flipped_bit", lambda: cluster.stats.wrong_answers["expert-1"] > 0)
    with load.history.fault(lie):
        found_s = time.monotonic()
        load.wait_for_tokens(2 * WARM)
    load.wait_for_tokens(2 * WARM)
    load.end(label="FX39 slices", since_s=found_s)
    assert set(cluster.stats.wrong_answers) == {"expert-1"}, "a sound host was accused"
    assert "expert-1" not in cluster.live


def test_a_worker_that_cuts_otherwise_is_refused_with_the_remedy(make: Make) -> None:
    cluster = make(num_hosts=1, num_replicas=1, expert_slices=SLICES)
    cluster.spec = replace(cluster.spec, expert_slices=1)
    worker = cluster.start_worker(0)
    with pytest.raises(HandshakeError, match="same `expert_slices`") as caught:
        worker.connect(cluster.addresses)
    assert caught.value.reason == "NUM_SLICES_DIFFERS"
