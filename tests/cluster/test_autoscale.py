"""How many hosts the load wants, over made-up days."""

import itertools

import pytest

from cluster.planning.autoscale import AutoscalePolicy, Pressure, Reading, decide

POLICY = AutoscalePolicy(min_hosts=2, max_hosts=10, up_after_s=10.0, down_after_s=100.0)


def live(
    seconds: int, num_hosts: int, work: float, *, queue_age_s: float = 0.0, policy: AutoscalePolicy = POLICY
) -> list[int]:
    """Hosts second by second; `work` is how many hosts it would keep busy. Scaling takes effect at once."""
    pressure, hosts = Pressure(), [num_hosts]
    for second in range(seconds):
        busy = min(1.0, work / hosts[-1])
        reading = Reading(at_s=float(second), num_hosts=hosts[-1], busy=busy, queue_age_s=queue_age_s)
        pressure, target = decide(policy, pressure, reading)
        hosts.append(target)
    return hosts


def test_busy_hosts_get_help_after_a_while_and_not_at_once() -> None:
    hosts = live(60, 4, 3.6)
    assert hosts[10] == 4
    assert hosts[12] == 5
    assert hosts[-1] == 5, "3.6 of 5 is within the band"


def test_a_queue_calls_for_hosts_even_if_they_are_idle() -> None:
    assert live(15, 4, 0.0, queue_age_s=3.0)[-1] == 5


def test_idle_hosts_go_slowly_and_not_below_the_least() -> None:
    hosts = live(400, 8, 0.5)
    assert hosts[99] == 8
    assert hosts[-1] == 2


def test_fewer_hosts_would_not_be_called_back() -> None:
    for work in (0.5, 1.0, 1.7, 2.4, 3.3, 5.0):
        hosts = live(2000, 8, work)
        changes = [(a, b) for a, b in itertools.pairwise(hosts) if a != b]
        assert len(changes) <= 2, f"{work=} makes the pool swing: {changes}"


def test_a_short_burst_changes_nothing() -> None:
    pressure = Pressure()
    for second in range(200):
        busy = 1.0 if second % 20 < 8 else 0.5
        reading = Reading(at_s=float(second), num_hosts=4, busy=busy, queue_age_s=0.0)
        pressure, target = decide(POLICY, pressure, reading)
        assert target == 4


def test_the_bounds_hold_whatever_the_load() -> None:
    assert max(live(500, 4, 50.0)) == 10
    assert live(1, 1, 0.0)[-1] == 2, "a pool below the least grows to it"


@pytest.mark.parametrize(
    "wrong", [{"min_hosts": 0}, {"min_hosts": 5, "max_hosts": 4}, {"low": 0.9}, {"high": 1.5}, {"up_after_s": -1.0}]
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"give|shares|seconds"):
        AutoscalePolicy(**wrong)  # type: ignore[arg-type]
