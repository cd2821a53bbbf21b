"""The engine over real Ray actors: same tokens, also while Ray stands still; nothing left behind; clear failures."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.util import list_named_actors
from ray.util.placement_group import placement_group_table

from cluster.operation import Kind, Operation, Phase
from cluster.ray_engine import RayEngine
from cluster.worker import LoadProgress, Role, State
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import CheckpointError, UnavailableError
from llama4_dist.request import FinishReason
from tests.checkpoints import make_checkpoint
from tests.cluster.running import Collector, reference, some_requests
from tests.scheduling import slice_ns
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

ROOT = Path(__file__).parents[2]
OPTIONS = EngineOptions(num_blocks=128, max_num_seqs=8)


@pytest.fixture(scope="module")
def engine(model_dir: Path, ray_session: None) -> Iterator[RayEngine]:
    engine = RayEngine(model_dir, num_expert_hosts=2, num_replicas=1, options=OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def collector(engine: RayEngine) -> Collector:
    collector = Collector()
    engine.start(collector.collect)
    return collector


def descendants() -> set[psutil.Process]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may end between being listed and being asked
            if "Worker" in process.name() or "Actor" in process.name():
                found.add(process)
    return found


def live_actors() -> list[str]:
    return [actor["name"] for actor in list_named_actors(all_namespaces=True)]


def live_groups() -> list[str]:
    return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def run_dirs() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("llama4-????????"))


@contextmanager
def stopped_ray() -> Iterator[None]:
    """Stop Ray's own daemons, so that nothing can pass through them."""
    daemons = [p for p in psutil.Process().children(recursive=True) if p.name() in ("raylet", "gcs_server")]
    assert len(daemons) == 2
    try:
        for daemon in daemons:
            daemon.suspend()
        wait_until(lambda: all(daemon.status() == psutil.STATUS_STOPPED for daemon in daemons))
        yield
    finally:
        for daemon in daemons:
            daemon.resume()


def test_two_hosts_give_the_tokens_of_one_process_while_ray_stands_still(
    engine: RayEngine, collector: Collector, model_dir: Path
) -> None:
    requests = some_requests("two")
    expected = reference(model_dir, requests)
    with stopped_ray():
        assert collector.run(engine, requests) == expected
        stats = engine.stats()
    num_rows = 4 * sum(len(request.prompt_token_ids) + 11 for request in requests)
    assert sum(stats.host_rows.values()) == num_rows
    assert stats.host_rows.keys() == stats.host_bytes_in.keys() == {"expert-0", "expert-1"}


def test_logits_are_those_of_one_process(engine: RayEngine, collector: Collector, model_dir: Path) -> None:
    local = build_single_process(model_dir, num_threads=1)
    local.start(lambda outputs: None)
    try:
        expected_TV = local.score(range(40))
    finally:
        local.close()
    assert torch.equal(engine.score(range(40)), expected_TV)


def test_an_abort_reaches_the_attention_worker(engine: RayEngine, collector: Collector) -> None:
    (request,) = some_requests("long", count=1, max_tokens=900)
    engine.submit(request)
    collector.wait_for_tokens("long0", 3)
    engine.abort("long0")
    collector.wait_for(["long0"])
    assert collector.last["long0"].finish_reason is FinishReason.CANCELLED
    wait_until(lambda: engine.stats().kv_blocks_free == 128)


def test_the_status_names_every_worker(engine: RayEngine) -> None:
    status = {worker.worker: worker for worker in engine.status()}
    assert status.keys() == {"controller", "expert-0", "expert-1", "attention-0"}
    assert {worker.role for worker in status.values()} == set(Role) - {Role.STAGE}, "the model is not cut"
    assert all(worker.state is State.READY for worker in status.values())
    assert len({worker.pid for worker in status.values()} - {0, os.getpid()}) == 4
    assert all(psutil.Process(worker.pid).nice() <= psutil.Process().nice() for worker in status.values())
    own = slice_ns(0)
    shorter = {name for name, worker in status.items() if slice_ns(worker.pid) < own}
    assert shorter == (status.keys() - {"controller"} if own else set())
    held = [set(status[f"expert-{index}"].experts) for index in range(2)]
    assert held[0] | held[1] == {(layer, expert) for layer in range(4) for expert in range(16)}
    assert not held[0] & held[1]
    assert status["attention-0"].epoch == status["controller"].epoch == 1
    assert {worker.node for worker in status.values()} == {status["controller"].node} != {""}
    assert all(time.time() * 1000 - worker.incarnation < 600_000 for worker in status.values())
    assert all(worker.memory_bytes > 50e6 for worker in status.values())


def test_the_controllers_process_does_without_torch(engine: RayEngine) -> None:
    with_torch = {
        worker.role
        for worker in engine.status()
        if any("libtorch" in mapped.path for mapped in psutil.Process(worker.pid).memory_maps())
    }
    assert with_torch == {Role.EXPERT, Role.ATTENTION}


def test_every_port_of_a_worker_is_bound_to_loopback(engine: RayEngine) -> None:
    for worker in engine.status():
        sockets = psutil.Process(worker.pid).net_connections("tcp")
        listening = {connection.laddr.ip for connection in sockets if connection.status == "LISTEN"}
        assert listening
        assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_two_attention_workers_share_four_hosts_and_closing_leaves_nothing(model_dir: Path) -> None:
    actors, groups, dirs = sorted(live_actors()), sorted(live_groups()), run_dirs()
    requests, collector = some_requests("four"), Collector()
    engine = RayEngine(model_dir, num_expert_hosts=4, num_attention_workers=2, num_replicas=2, options=OPTIONS)
    try:
        engine.start(collector.collect)
        assert len(run_dirs() - dirs) == 1
        assert collector.run(engine, requests) == reference(model_dir, requests)
        pids = [worker.pid for worker in engine.status()]
        assert len(set(pids)) == 7
        assert engine.stats().host_rows.keys() == {f"expert-{index}" for index in range(4)}
    finally:
        engine.close()
    engine.close()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    wait_until(lambda: sorted(live_actors()) == actors)
    assert sorted(live_groups()) == groups
    assert run_dirs() == dirs


def end_of(engine: RayEngine, operation: Operation) -> Operation:
    wait_until(lambda: engine.control.operation(operation.name).phase.final)
    return engine.control.operation(operation.name)


def groups_of(engine: RayEngine, others: list[str]) -> set[str]:
    """Workers that hold a placement group."""
    return {name.partition("-")[2].partition("-")[2] for name in live_groups() if name not in others}


def test_a_cluster_whose_controller_was_killed_serves_on_gets_another_and_scales(model_dir: Path) -> None:
    actors, groups, dirs = sorted(live_actors()), sorted(live_groups()), run_dirs()
    running, later = some_requests("running", max_tokens=60), some_requests("later")
    collector = Collector()
    engine = RayEngine(model_dir, num_expert_hosts=2, options=OPTIONS)
    try:
        engine.start(collector.collect)
        pids = {worker.worker: worker.pid for worker in engine.status()}
        for request in running:
            engine.submit(request)
        collector.wait_for_tokens("running0", 2)
        assert "running0" not in collector.last
        os.kill(pids["controller"], signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pids["controller"]))
        with pytest.raises(UnavailableError) as caught:
            engine.status()
        assert caught.value.reason in ("CONTROLLER_LOST", "WORKER_LOST")

        def answers() -> bool:
            with suppress(UnavailableError):
                return bool(engine.status())
            return False

        wait_until(answers)
        # Ray has noticed by now, and whatever it ends with a controller would be ending.
        now = {worker.worker: worker.pid for worker in engine.status()}
        assert now.pop("controller") != pids["controller"]
        assert now == {worker: pid for worker, pid in pids.items() if worker != "controller"}
        up = end_of(engine, engine.control.scale(3))
        assert (up.phase, up.epoch, up.change.added) == (Phase.DONE, 2, ("expert-2",))  # type: ignore[union-attr]
        assert groups_of(engine, groups) == {"expert-0", "expert-1", "expert-2", "attention-0"}
        down = end_of(engine, engine.control.scale(1))
        assert (down.phase, down.epoch) == (Phase.DONE, 3)
        (removed, also) = down.change.removed  # type: ignore[union-attr]
        assert groups_of(engine, groups) == {"expert-0", "expert-1", "expert-2", "attention-0"} - {removed, also}
        pids |= {worker.worker: worker.pid for worker in engine.status()}
        got = collector.run(engine, later)
        collector.wait_for([request.request_id for request in running])
        got |= {request.request_id: tuple(collector.tokens[request.request_id]) for request in running}
        assert got == reference(model_dir, [*running, *later])
    finally:
        engine.close()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids.values()))
    wait_until(lambda: sorted(live_actors()) == actors)
    assert sorted(live_groups()) == groups
    assert run_dirs() == dirs


def test_killed_hosts_and_attention_workers_are_replaced_while_requests_run(model_dir: Path) -> None:
    requests, collector = some_requests("kill", max_tokens=200), Collector()
    engine = RayEngine(model_dir, num_expert_hosts=2, num_attention_workers=2, options=OPTIONS)
    try:
        engine.start(collector.collect)
        before = {worker.worker: worker.pid for worker in engine.status()}
        for request in requests:
            engine.submit(request)
        collector.wait_for_tokens("kill0", 2)
        for worker in ("expert-1", "attention-1"):
            os.kill(before[worker], signal.SIGKILL)
        collector.wait_for([request.request_id for request in requests])
        assert {name: tuple(tokens) for name, tokens in collector.tokens.items()} == reference(model_dir, requests)

        def replaced() -> bool:
            now = {worker.worker: worker for worker in engine.status()}
            return all(
                now[worker].state is State.READY and now[worker].pid != before[worker]
                for worker in ("expert-1", "attention-1")
            )

        wait_until(replaced)
        wait_until(lambda: not engine.control.view().operation)
        assert [one.kind for one in engine.control.operations() if one.phase is Phase.DONE] == [Kind.REPAIR]
        assert all(len(hosts) == 2 for hosts in engine.control.placement().hosts_of.values())
        later = some_requests("later")
        assert collector.run(engine, later) == reference(model_dir, later)
    finally:
        engine.close()


def test_a_controller_answers_while_it_starts_the_cluster_and_its_death_ends_the_start(model_dir: Path) -> None:
    actors, groups = sorted(live_actors()), sorted(live_groups())
    before, killers, answers = descendants(), list[threading.Thread](), list[object]()

    def kill() -> None:
        wait_until(lambda: any("ControllerActor" in process.name() for process in descendants() - before))
        (controller,) = [process for process in descendants() - before if "ControllerActor" in process.name()]
        (name,) = [name for name in live_actors() if name.endswith("-controller") and name not in actors]
        try:
            answers.append(ray.get(ray.get_actor(name).call.remote("progress"), timeout=10))
        finally:
            controller.kill()

    def hold_a_worker_and_kill_the_controller(event: LoadProgress) -> None:
        if event.role is Role.ATTENTION and not killers:
            wait_until(lambda: descendants() - before)
            (descendants() - before).pop().suspend()  # so that the cluster cannot be ready first
            killers.append(threading.Thread(target=kill))
            killers[0].start()

    with pytest.raises(UnavailableError, match="process of controller died"):
        RayEngine(model_dir, num_expert_hosts=1, options=OPTIONS, progress=hold_a_worker_and_kill_the_controller)
    killers[0].join()
    assert answers == [()], "the controller answers while it waits for workers to come up"
    wait_until(lambda: sorted(live_actors()) == actors)
    assert sorted(live_groups()) == groups
    wait_until(lambda: not any(p.is_running() for p in descendants() - before))


def test_a_damaged_checkpoint_ends_the_start_with_its_file_and_leaves_nothing(tmp_path: Path) -> None:
    damaged = make_checkpoint(tmp_path, "scout")
    actors, groups, dirs = sorted(live_actors()), sorted(live_groups()), run_dirs()

    def truncate(event: LoadProgress) -> None:  # after the driver read the headers, before the workers do
        if event.role is Role.ATTENTION:
            (shard,) = tmp_path.glob("*-00002-of-00002.safetensors")
            os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(CheckpointError, match="00002-of-00002"):
        RayEngine(damaged, num_expert_hosts=1, options=OPTIONS, progress=truncate)
    wait_until(lambda: sorted(live_actors()) == actors)
    assert sorted(live_groups()) == groups
    assert run_dirs() == dirs


def test_a_worker_that_dies_while_it_starts_ends_the_start_and_takes_the_others_along(model_dir: Path) -> None:
    actors, groups = sorted(live_actors()), sorted(live_groups())
    before, killed = descendants(), list[float]()

    def kill_one(event: LoadProgress) -> None:
        if event.role is Role.ATTENTION and not killed:
            wait_until(lambda: descendants() - before)
            victim = (descendants() - before).pop()
            killed.append(time.monotonic())
            victim.kill()

    with pytest.raises(UnavailableError, match="died") as caught:
        RayEngine(model_dir, num_expert_hosts=1, options=OPTIONS, progress=kill_one)
    assert caught.value.reason == "WORKER_LOST"
    assert time.monotonic() - killed[0] < 20
    wait_until(lambda: sorted(live_actors()) == actors)
    assert sorted(live_groups()) == groups
    wait_until(lambda: not any(p.is_running() for p in descendants() - before))


DRIVER = """
import sys, time
from cluster.ray_engine import RayEngine
engine = RayEngine(sys.argv[1], num_expert_hosts=1)
print(*[worker.pid for worker in engine.status()], flush=True)
time.sleep(600)
"""


def test_workers_die_with_their_driver(model_dir: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["TMPDIR"] = tempfile.mkdtemp(prefix="l4d-", dir=Path(tempfile.gettempdir()).parent)  # a short path
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(model_dir)], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    try:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 3  # controller, expert host, attention worker
        family = psutil.Process(driver.pid).children(recursive=True)
        assert set(pids) <= {process.pid for process in family}
        # Ray's two agents look for their raylet, then try for a minute to report its death; they hold nothing of ours.
        family = [process for process in family if "Agent" not in process.name()]
        driver.send_signal(signal.SIGKILL)
        driver.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
    finally:
        driver.kill()
        driver.wait(60)
        subprocess.run(["rm", "-rf", environment["TMPDIR"]], check=True)
