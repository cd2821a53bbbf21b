"""What can happen in a simulated world: requests, kills, stops, changes. Decides nothing about what must follow."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.operation import ChangeOptions, Kind
from llama4_dist.request import FinishReason
from tests.simulation.attention_process import SimAttention
from tests.simulation.expert_process import SimHost
from tests.simulation.judge import PAIRS, Record
from tests.simulation.plan import CONTENTS

if TYPE_CHECKING:
    from tests.simulation.world import World

SLOW_S = 0.4
PHASE_OF = {"receiving": "receiving", "computing": "computing", "replied": "reply posted", "adopting": "adopting"}
OPTIONS = ChangeOptions(drain_timeout_s=2.0)


def act(world: "World", action: str) -> None:
    """Do one action between steps."""
    ACTIONS[action](world)


def strike(world: "World", action: str, process: SimHost | SimAttention, point: str) -> None:
    """Let a planned blow fall at a point that `process` passes."""
    target = process if isinstance(process, SimHost) and process.alive else None
    if action == "kill" and target is not None:
        kill(world, target, point)
    elif action in ("kill", "kill_another"):
        kill_one(world, point)
    elif action == "kill_silently":
        kill_one(world, point, silently=True, target=target)
    elif action == "stop":
        stop(world, target)
    elif action == "kill_holders":
        kill_holders(world, point)
    elif action == "kill_controller":
        kill_controller(world)
    elif action == "cancel":
        cancel(world)
    else:
        seconds = world.random.choice((0.05, 0.5, 4.0)) if action == "delay" else 0.0
        world.wire.next_fault = (action, seconds)
        if point == "call:publish":
            world.judge.excused.add(process.name)


def meanwhile(world: "World") -> None:
    """Do something in the middle of a change: mostly the engines go on."""
    chance = world.random.random()
    if world.stepping is not None:
        return
    if chance < 0.6:
        world.step_all()
    elif chance < 0.7:
        submit(world)
    elif chance < 0.76:
        kill_one(world, "call")
    elif chance < 0.8:
        stop(world)
    elif chance < 0.84:
        kill_controller(world)
    elif chance < 0.88:
        cancel(world)
    elif not world.beginning:
        (world.look if chance < 0.95 else lambda: scale(world))()


def submit(world: "World") -> None:
    workers = world.attention
    if not workers:
        return
    worker, content = world.random.choice(workers), world.random.choice(CONTENTS)
    request_id = f"r{len(world.judge.records)}"
    world.note(f"{request_id} to {worker.name}: {content}")
    world.judge.records[request_id] = Record(content=content, judged=world.judging)
    world.judge.on_outputs(worker, worker.core.add(content.request(request_id)))


def abort(world: "World") -> None:
    live = [name for name, record in world.judge.records.items() if not record.ended]
    if not live:
        return
    name = world.random.choice(live)
    for worker in world.attention:
        outputs = worker.core.abort(name)
        world.judge.note(all(o.finish_reason is FinishReason.CANCELLED for o in outputs), f"{name} is not cancelled")
        world.judge.on_outputs(worker, outputs)


def kill(world: "World", host: SimHost, point: str, *, silently: bool = False) -> None:
    """Kill a host and keep account of when."""
    world.note(f"{host.name} dies{' silently' if silently else ''} ({point})")
    for phase in (*_going_on(world), PHASE_OF.get(point, "idle" if world.is_idle else "beside a step or a call")):
        world.kills[phase] += 1
    world.kills["all"] += 1
    host.kill(silently=silently)


def _going_on(world: "World") -> set[str]:
    """Name what goes on, for the account of kills."""
    found = set()
    if not any(record for record in world.judge.records):
        found.add("before the first request")
    controller = world.driver.controller
    if controller is None:
        found.add("controller dead")
    elif name := controller.ledger.running:
        operation = controller.operation(name)
        change = operation.change
        if operation.kind is Kind.REPAIR:
            found.add("repair")
        elif operation.kind is Kind.DRAIN or (change is not None and change.removed):
            found.add("drain")
        elif change is not None and change.added:
            found.add("scale-up")
    return found


def kill_one(world: "World", point: str = "", *, silently: bool = False, target: SimHost | None = None) -> None:
    if target is not None or world.living:
        kill(world, target or world.random.choice(world.living), point, silently=silently)


def kill_holders(world: "World", point: str = "") -> None:
    """Kill every host that holds one expert."""
    pair = world.random.choice(PAIRS)
    for host in world.living:
        if pair in host.held:
            kill(world, host, point)


def kill_all(world: "World") -> None:
    for host in world.living:
        kill(world, host, "")


def stop(world: "World", target: SimHost | None = None) -> None:
    """Stop a host for a while; sometimes for so long that it is replaced."""
    running = [host for host in world.living if not host.stopped]
    if target is None and not running:
        return
    host = target or world.random.choice(running)
    if not host.stopped:
        seconds = world.random.choice((0.2, 1.0, 3.0, 14.0))
        world.note(f"{host.name} stops for {seconds} s")
        host.stop()
        world.resumes.append((world.clock.now + seconds, host))


def slow(world: "World") -> None:
    """Make a host slow, or as fast as before."""
    if world.living:
        host = world.random.choice(world.living)
        world.note(f"{host.name} is {'fast again' if host.slow else 'slow'}")
        host.slow_down(0.0 if host.slow else SLOW_S)


def scale(world: "World") -> None:
    num_hosts = world.random.randint(1, 5)
    _ask(world, f"scale to {num_hosts}", lambda controller: controller.scale(num_hosts, OPTIONS))


def drain(world: "World") -> None:
    if world.hosts:
        name = world.random.choice(sorted(world.hosts))
        _ask(world, f"drain {name}", lambda controller: controller.drain(name, OPTIONS))


def rebalance(world: "World") -> None:
    _ask(world, "rebalance", lambda controller: controller.rebalance(OPTIONS))


def cancel(world: "World") -> None:
    controller = world.driver.controller
    if controller is not None and (name := controller.ledger.running):
        world.note(f"{name} is cancelled")
        controller.cancel(name)


def kill_controller(world: "World") -> None:
    if world.driver.controller is not None and world.attention:
        world.driver.lose_controller()


def pass_time(world: "World") -> None:
    for _ in range(world.random.choice((2, 8, 20))):
        world.pass_time(0.1)


def _ask(world: "World", what: str, ask: Callable[..., object]) -> None:
    controller = world.driver.controller
    if controller is not None:
        world.note(what)
        world.operate(what, lambda: ask(controller))
        world.run_queued()


ACTIONS: dict[str, Callable[["World"], None]] = {
    "step": lambda world: world.step_all(),
    "submit": submit,
    "pass_time": pass_time,
    "abort": abort,
    "kill": kill_one,
    "kill_silently": lambda world: kill_one(world, silently=True),
    "stop": stop,
    "slow": slow,
    "kill_holders": kill_holders,
    "kill_all": kill_all,
    "scale": scale,
    "drain": drain,
    "rebalance": rebalance,
    "kill_controller": kill_controller,
}
