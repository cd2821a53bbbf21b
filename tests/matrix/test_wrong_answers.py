"""FX39: a host answers, and what it says is wrong: not finite, another layer's, other rows', one bit off."""

import time
from collections.abc import Callable

import pytest

from llama4_dist.chaos.faults.fault import Fault, must
from tests.matrix.conftest import Cases
from tests.matrix.harness import Cluster
from tests.matrix.hosts import HostProcess

MAX_DETECTION_S = 10.0
WARM = 12
Make = Callable[..., Cluster]


class Lie(Fault):
    """A host that is wrong in one way, until it is healed or barred; `shows` tells that somebody noticed."""

    def __init__(self, host: HostProcess, kind: str, shows: Callable[[], bool]) -> None:
        self._host, self._kind, self._shows = host, kind, shows

    def inject(self) -> None:
        self._host.call("lie", kind=self._kind)

    def verify(self) -> None:
        must(self._shows, f"{self._kind} of {self._host.name} is noticed", timeout_s=MAX_DETECTION_S)

    def heal(self) -> None:
        self._host.call("lie", kind="")

    def verify_healed(self) -> None:
        assert not self._host.process.is_dead, "a lie kills no host"


def test_rows_that_are_not_finite_are_refused_and_asked_of_a_copy(make: Make, cases: Cases) -> None:
    cluster = make().start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    lie = Lie(cluster.hosts["expert-1"], "nan", lambda: cluster.stats.refusals["REPLY_NOT_FINITE"] > 0)
    with load.history.fault(lie):
        load.wait_for_tokens(WARM)
    cluster.wait_until_used("expert-1")
    load.end(label="FX39 nan")
    assert not cluster.stats.lost_hosts


def test_an_answer_in_the_name_of_another_layer_closes_the_link(make: Make, cases: Cases) -> None:
    cluster = make().start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with load.history.fault(
        Lie(cluster.hosts["expert-1"], "wrong_echo", lambda: cluster.stats.lost_hosts["REPLY_MISMATCH"] > 0)
    ):
        load.wait_for_tokens(WARM)
    cluster.wait_until_used("expert-1")
    load.end(label="FX39 wrong echo")


@pytest.mark.parametrize("kind", ["stale_layer", "other_rows", "flipped_bit"])
def test_a_plausible_lie_is_found_by_comparison_and_the_liar_barred(make: Make, cases: Cases, kind: str) -> None:
    cluster = make(cross_check_every=8).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    begun_s = time.monotonic()
    lie = Lie(cluster.hosts["expert-1"], kind, lambda: cluster.stats.wrong_answers["expert-1"] > 0)
    with load.history.fault(lie):
        found_s = time.monotonic()
        load.wait_for_tokens(2 * WARM)
        load.wait_for_tokens(2 * WARM)
    load.end(label=f"FX39 {kind}, found after {found_s - begun_s:.2f} s", since_s=found_s)
    assert "expert-1" not in cluster.live, "it must not come back"
    assert set(cluster.stats.wrong_answers) == {"expert-1"}, "a sound host was accused"
