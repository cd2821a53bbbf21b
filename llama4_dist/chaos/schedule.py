"""What is done to a cluster, and when: drawn from a seed, so that a run can be had again. Pure; does nothing itself."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """One blow, or one change that an operator could ask for."""

    KILL_EXPERT = "kill_expert"
    STOP_EXPERT = "stop_expert"
    KILL_ATTENTION = "kill_attention"
    KILL_STAGE = "kill_stage"
    KILL_CONTROLLER = "kill_controller"
    KILL_GATEWAY = "kill_gateway"
    SCALE = "scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Do `action` at `at_s` from the start. `draw` in [0, 1) chooses the victim, `amount` is hosts or seconds."""

    at_s: float
    action: Action
    draw: float
    amount: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """How often what happens, in seconds between; None = never. Nothing happens in the first `quiet_s`.

    Those serve as the measure of what is usual. `hosts` are the sizes that scaling goes through in turn.
    """

    duration_s: float
    quiet_s: float = 5.0
    kill_every_s: float | None = 5.0
    stop_every_s: float | None = None
    scale_every_s: float | None = 20.0
    kill_attention_every_s: float | None = None
    kill_stage_every_s: float | None = None
    kill_controller_every_s: float | None = None
    kill_gateway_every_s: float | None = None
    hosts: tuple[int, ...] = (6, 3, 4)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.quiet_s < self.duration_s:
            raise ValueError(f"quiet_s={self.quiet_s} must be less than duration_s={self.duration_s}")
        for name, value in self._periods():
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0, or left out for never")
        if not self.hosts or min(self.hosts) < 1:
            raise ValueError(f"hosts={self.hosts}: give sizes from 1 on")

    def _periods(self) -> Iterator[tuple[str, float | None]]:
        for name in ("kill", "stop", "scale", "kill_attention", "kill_stage", "kill_controller", "kill_gateway"):
            yield f"{name}_every_s", getattr(self, f"{name}_every_s")


def steps(plan: ChaosPlan) -> list[Step]:
    """Draw the whole run, in order of time. Every period varies by a quarter, so that blows meet all moments."""
    draw = random.Random(plan.seed)  # noqa: S311 - a schedule, not a secret
    kinds = (
        (Action.KILL_EXPERT, plan.kill_every_s),
        (Action.STOP_EXPERT, plan.stop_every_s),
        (Action.KILL_ATTENTION, plan.kill_attention_every_s),
        (Action.KILL_CONTROLLER, plan.kill_controller_every_s),
        (Action.KILL_GATEWAY, plan.kill_gateway_every_s),
        (Action.SCALE, plan.scale_every_s),
        (Action.KILL_STAGE, plan.kill_stage_every_s),
    )
    found: list[Step] = []
    for action, every_s in kinds:
        if every_s is None:
            continue
        at_s, number = plan.quiet_s + every_s * draw.uniform(0.25, 1.0), 0
        while at_s < plan.duration_s:
            amount = (
                float(plan.hosts[number % len(plan.hosts)]) if action is Action.SCALE else draw.choice((0.2, 1.0, 3.0))
            )
            found.append(Step(at_s=at_s, action=action, draw=draw.random(), amount=amount))
            at_s += every_s * draw.uniform(0.75, 1.25)
            number += 1
    return sorted(found, key=lambda step: step.at_s)
