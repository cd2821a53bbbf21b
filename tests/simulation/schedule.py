"""Runs the schedule of a seed from the start of its cluster to its rest, and says what went wrong."""

import logging
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation import strikes
from tests.simulation.clock import Stuck
from tests.simulation.plan import Plan, draw_plan, draw_wrong_plan
from tests.simulation.stand_ins import installed
from tests.simulation.world import World

REST_TICKS = 3000
TICK_S = 0.1
LONGEST_SEARCH = 200  # steps in which a host that computes wrong answers has to be found


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a schedule."""

    seed: int
    breaches: list[str]
    trace: list[str]
    kills: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)


def run_seed(seed: int, variant: str = "", *, logs: bool = False) -> Outcome:
    """Run one schedule of kills, stops and changes."""
    return _run(draw_plan(seed, variant), seed, _play, logs=logs)


def run_wrong_seed(seed: int) -> Outcome:
    """Run one schedule in which a host computes wrong answers."""
    return _run(draw_wrong_plan(seed), seed, _find_wrong, logs=False)


def _run(plan: Plan, seed: int, play: Callable[[World], None], *, logs: bool) -> Outcome:
    world = World(plan, seed)
    world.note(f"seed {seed}: {plan}")
    before = logging.root.manager.disable
    logging.disable(logging.NOTSET if logs else logging.CRITICAL)
    try:
        with installed(world):
            try:
                world.driver.start()
                play(world)
            except Stuck as error:
                world.judge.note(False, f"stuck: {error}")
            except Exception as error:  # noqa: BLE001 - a defect is a finding
                world.judge.note(False, f"breaks: {error!r}")
                world.trace += traceback.format_exc().splitlines()
            finally:
                release(world)
    finally:
        logging.disable(before)
    return Outcome(
        seed=seed,
        breaches=world.judge.breaches,
        trace=world.trace,
        kills=world.kills,
        happened=world.passed + _happened(world),
    )


def _happened(world: World) -> Counter[str]:
    """Count what the engines and dispatchers had to do."""
    happened = Counter[str]()
    for worker in world.attention:
        stats = worker.dispatcher.stats()
        happened["hedged rows"] += stats.hedged_rows
        happened["late replies"] += stats.late_replies
        happened["compared answers"] += stats.checked_frames
        happened["preemptions"] += worker.core.scheduler.num_preemptions
        happened.update({f"refused: {reason}": count for reason, count in stats.refusals.items()})
        happened.update({f"lost: {reason}": count for reason, count in stats.lost_hosts.items()})
    happened["requests"] += len(world.judge.records)
    return happened


def _play(world: World) -> None:
    world.armed = True
    names, weights = zip(*world.plan.weights.items(), strict=True)
    if world.random.random() < 0.3:
        strikes.act(world, world.random.choice(("kill", "kill_holders", "scale", "kill_controller")))
    for _ in range(world.random.randint(0, 2)):
        strikes.submit(world)
    for _ in range(world.plan.num_actions):
        (action,) = world.random.choices(names, weights)
        strikes.act(world, action)
        world.pass_time(0.01)
        world.judge.look()
        if world.judge.breaches:
            return
    come_to_rest(world)


def come_to_rest(world: World) -> None:
    """Let faults cease; then everything has to end well, in bounded time."""
    world.note("faults cease")
    world.armed, world.calm = False, True
    for _, host in world.resumes:
        if host.alive:
            host.go_on()
    world.resumes.clear()
    for host in world.hosts.values():
        host.slow_down(0.0)
        for end in host.ends:
            end.heal()
    disorder: list[str] = []
    for _ in range(REST_TICKS):
        world.step_all()
        world.pass_time(TICK_S)
        world.judge.look()
        disorder = [] if world.judge.breaches else world.judge.disorder()
        if not disorder:
            return
    world.judge.note(False, f"does not come to rest: {disorder}")


def _find_wrong(world: World) -> None:
    """Let a host compute wrong answers: every worker has to find it, and no other; after that all tokens are right."""
    wrong = world.random.choice(sorted(world.hosts))
    world.note(f"{wrong} computes wrong answers")
    world.hosts[wrong].wrong = True
    world.judging = False
    for _ in range(LONGEST_SEARCH):
        if all(worker.dispatcher.links.keys() == world.hosts.keys() - {wrong} for worker in world.attention):
            break
        strikes.submit(world)
        world.step_all()
        world.pass_time(0.01)
    found = [worker.name for worker in world.attention if wrong not in worker.dispatcher.links]
    world.judge.note(len(found) == len(world.attention), f"{wrong} is wrong, which only {found} found")
    world.judging = True
    for _ in range(8):
        strikes.submit(world)
    come_to_rest(world)


def release(world: World) -> None:
    for worker in world.attention:
        worker.release()
    for host in world.driver.every_host:
        host.release()
