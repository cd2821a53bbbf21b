"""Draws what a schedule is made of from its seed: the cluster, the faults and when they strike. Runs nothing."""

import random
from dataclasses import dataclass

from tests.simulation.tiny_model import EOS, Content

DATA_POINTS = ("dispatching", "receiving", "computing", "replied", "adopting", "waiting")
CALL_POINTS = (
    *("call:location", "call:load", "call:add", "call:fingerprints", "call:connect", "call:publish", "call:keep"),
    *("call:close", "call:status", "call:restore", "call:topology"),
)
DATA_BLOWS = ("kill", "kill", "kill", "kill_another", "kill_silently", "stop", "kill_holders", "kill_controller")
CALL_BLOWS = ("kill", "kill", "kill_another", "stop", "kill_controller", "kill_controller", "cancel", "kill_holders")
CALL_FAULTS = ("delay", "fails", "answer_lost")
FAULTY_CALLS = ("call:publish", "call:connect", "call:keep", "call:add", "call:load", "call:fingerprints")

_draw = random.Random(20)
CONTENTS = tuple(
    Content(
        prompt=tuple(_draw.randrange(EOS) for _ in range(_draw.choice((1, 2, 3, 5, 8)))),
        max_tokens=_draw.choice((1, 2, 4, 6)),
        seed=None if index % 2 else _draw.getrandbits(40),
    )
    for index in range(32)
)


@dataclass(slots=True)
class Blow:
    """Something that happens when a point is passed for the `left`-th time from now on."""

    point: str
    left: int
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One schedule. `nesting` is how often something else happens in the middle of a change of the cluster."""

    num_hosts: int
    num_replicas: int
    num_workers: int
    check_every: int
    num_blocks: int
    max_tokens_per_step: int
    expert_timeout_s: float
    capacity_bytes: int | None
    late_epochs: bool
    links: str  # clean, noisy or lossy
    nesting: float
    refusing: float  # how often a process cannot be had
    num_actions: int
    weights: dict[str, int]
    blows: tuple[Blow, ...]


_LATE_EPOCH = (Blow("call:publish", 1, "delay"), Blow("call:publish", 2, "kill_controller"))
USUAL = {
    "step": 30,
    "submit": 8,
    "pass_time": 4,
    "abort": 1,
    "kill": 3,
    "kill_silently": 1,
    "stop": 2,
    "slow": 1,
    "kill_holders": 1,
    "scale": 2,
    "drain": 1,
    "rebalance": 1,
    "kill_controller": 1,
    "kill_all": 0,
}


def draw_plan(seed: int, variant: str = "") -> Plan:
    """Return the schedule of a seed.

    In the variant `tight` hosts have room for little more than they hold; in `late` an epoch that a dead controller
    published may arrive after the next one has asked the workers what they follow.
    """
    draw = random.Random(seed)
    weights = dict(USUAL)
    for favoured in draw.sample(sorted(USUAL), 2):
        weights[favoured] += 4
    num_hosts = draw.choice((1, 2, 2, 3, 3, 4)) if variant != "tight" else 3
    return Plan(
        num_hosts=num_hosts,
        num_replicas=draw.choice((1, 2)) if num_hosts > 1 else 1,
        num_workers=draw.choice((1, 1, 2)) if variant != "late" else 2,
        check_every=draw.choice((0, 0, 3)),
        num_blocks=draw.choice((8, 9, 12)),
        max_tokens_per_step=draw.choice((4, 6, 10)),
        expert_timeout_s=30.0,
        capacity_bytes=60 if variant == "tight" else None,
        late_epochs=variant == "late",
        links=draw.choice(("clean", "clean", "noisy", "noisy", "lossy")),
        nesting=draw.choice((0.0, 0.2, 0.5)),
        refusing=draw.choice((0.0, 0.0, 0.3)),
        num_actions=draw.randint(10, 24),
        weights=weights,
        blows=_LATE_EPOCH if variant == "late" else tuple(_draw_blow(draw) for _ in range(draw.randint(1, 4))),
    )


def draw_wrong_plan(seed: int) -> Plan:
    """Return a schedule in which one host computes wrong answers, and nothing else happens."""
    draw = random.Random(seed)
    return Plan(
        num_hosts=3,
        num_replicas=2,
        num_workers=draw.choice((1, 2)),
        check_every=draw.choice((1, 2)),
        num_blocks=12,
        max_tokens_per_step=10,
        expert_timeout_s=30.0,
        capacity_bytes=None,
        late_epochs=False,
        links="clean",
        nesting=0.0,
        refusing=0.0,
        num_actions=0,
        weights={},
        blows=(),
    )


def _draw_blow(draw: random.Random) -> Blow:
    kind = draw.random()
    if kind < 0.6:
        return Blow(draw.choice(DATA_POINTS), draw.randint(1, 25), draw.choice(DATA_BLOWS))
    if kind < 0.85:
        return Blow(draw.choice(CALL_POINTS), draw.randint(1, 6), draw.choice(CALL_BLOWS))
    point = draw.choice(FAULTY_CALLS)
    # A host whose `keep` fails holds more than it has to until the next change, and the operator is told so.
    faults = ("delay", "answer_lost") if point == "call:keep" else CALL_FAULTS
    return Blow(point, draw.randint(1, 6), draw.choice(faults))
