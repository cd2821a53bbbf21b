"""The pool follows the load: real controller, workers that are plain objects, a clock moved by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.control_plane.autoscaling import Autoscaling, busy_share
from cluster.operation import ChangeOptions, HostLoad
from cluster.planning.autoscale import AutoscalePolicy
from cluster.worker import Role
from llama4_dist.errors import ConflictError

POLICY = AutoscalePolicy(min_hosts=1, max_hosts=4, up_after_s=10.0, down_after_s=60.0)


class Pool:
    """Hosts that compute a given share of the time; what a controller offers to the autoscaler."""

    def __init__(self, num_hosts: int) -> None:
        self.now_s = 100.0
        self.busy = 0.5
        self.queue_s = 0.0
        self.compute_s = 0.0
        self.asked: list[int] = []
        self.refusal: Exception | None = None
        self.topology = SimpleNamespace(hosts={f"expert-{index}": None for index in range(num_hosts)})
        self.members: Any = self

    def loads(self) -> list[HostLoad]:
        return [
            HostLoad(host=host, incarnation=1, at_s=self.now_s, compute_s=self.compute_s)
            for host in self.topology.hosts
        ]

    def of(self, role: Role) -> list[str]:
        assert role is Role.ATTENTION
        return ["attention-0"]

    def try_each(self, workers: list[str], method: str, *, timeout_s: float) -> tuple[dict[str, float], dict[str, Any]]:
        assert method == "queue_age_s"
        return dict.fromkeys(workers, self.queue_s), {}

    def scale(self, num_hosts: int, options: ChangeOptions) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(num_hosts)
        self.topology = SimpleNamespace(hosts={f"expert-{index}": None for index in range(num_hosts)})

    def live(self, autoscaling: Autoscaling, seconds: int) -> None:
        for _ in range(seconds):
            self.now_s += 1.0
            self.compute_s += self.busy
            autoscaling.look()


def start(num_hosts: int) -> tuple[Pool, Autoscaling]:
    pool = Pool(num_hosts)
    return pool, Autoscaling(pool, POLICY, clock=lambda: pool.now_s)  # type: ignore[arg-type]


def test_busy_hosts_are_joined_by_another() -> None:
    pool, autoscaling = start(2)
    pool.busy = 0.95
    pool.live(autoscaling, 9)
    assert pool.asked == []
    pool.live(autoscaling, 10)
    assert pool.asked == [3]


def test_requests_that_wait_call_for_a_host_too() -> None:
    pool, autoscaling = start(2)
    pool.queue_s = 5.0
    pool.live(autoscaling, 20)
    assert pool.asked == [3]


def test_idle_hosts_are_sent_away_after_a_long_while() -> None:
    pool, autoscaling = start(3)
    pool.busy = 0.05
    pool.live(autoscaling, 50)
    assert pool.asked == []
    pool.live(autoscaling, 30)
    assert pool.asked == [1]


def test_a_refusal_is_no_harm_and_it_tries_again() -> None:
    pool, autoscaling = start(2)
    pool.busy, pool.refusal = 0.95, ConflictError("another change runs")
    pool.live(autoscaling, 20)
    pool.refusal = None
    pool.live(autoscaling, 20)
    assert pool.asked[0] == 3


def load(host: str, at_s: float, compute_s: float, incarnation: int = 1) -> HostLoad:
    return HostLoad(host=host, incarnation=incarnation, at_s=at_s, compute_s=compute_s)


def test_only_hosts_that_lived_through_a_window_count() -> None:
    before = {"a": load("a", 10.0, 5.0), "b": load("b", 10.0, 5.0)}
    now = {"a": load("a", 12.0, 6.0), "b": load("b", 12.0, 0.1, incarnation=2), "c": load("c", 12.0, 2.0)}
    assert busy_share(before, now) == pytest.approx(0.5)
    assert busy_share({}, now) is None
