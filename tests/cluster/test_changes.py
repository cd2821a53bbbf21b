"""Changes of the expert hosts under the real controller, over workers that note every breach of the contract."""

import threading
from collections.abc import Callable, Iterator

import pytest

from cluster.operation import ChangeOptions, Phase
from cluster.worker import Role
from llama4_dist.errors import (
    ConflictError,
    DuplicateRequestError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from tests.cluster.fake_workers import GEOMETRY, SWITCH_S, FakeHost
from tests.cluster.fakes import FakeSpawner, fail
from tests.cluster.small_clusters import SmallCluster, hasten
from tests.waiting import wait_until

NUM_PAIRS = len(GEOMETRY.pairs)
Make = Callable[..., SmallCluster]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    hasten(monkeypatch)
    made: list[SmallCluster] = []

    def make(*arguments: int, **options: object) -> SmallCluster:
        made.append(SmallCluster(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


def test_hosts_come_and_go_and_the_figures_add_up(make: Make) -> None:
    cluster = make(2)
    for epoch, num_hosts in enumerate((4, 3, 1, 2, 8, 2), start=2):
        before = cluster.topology.placement
        ended = cluster.scale(num_hosts)
        assert cluster.spawner.hosts().keys() == cluster.topology.hosts.keys(), "it ends when those that leave are gone"
        cluster.rest()
        after = cluster.topology.placement
        gained = sum(len(set(after.hosts_of[pair]) - set(before.hosts_of[pair])) for pair in GEOMETRY.pairs)
        change = ended.change
        assert change is not None
        assert (ended.phase, ended.epoch) == (Phase.DONE, epoch)
        assert (ended.epoch, cluster.topology.epoch, change.hosts_after) == (epoch, epoch, num_hosts)
        assert ended.moves_done == change.num_moves == gained > 0
        assert ended.bytes_done == change.num_bytes == gained * GEOMETRY.expert_bytes
        assert ended.hosts_ready == len(change.added)
        assert ended.paused_s == SWITCH_S
        assert (ended.error_reason, ended.warnings) == ("", ())
        nums = {len(after.held_by(host)) for host in cluster.topology.hosts}
        assert nums <= {NUM_PAIRS // num_hosts, -(-NUM_PAIRS // num_hosts)}
    assert cluster.attention().epochs == [1, 2, 3, 4, 5, 6, 7]


def test_copies_are_kept_where_hosts_and_memory_allow_and_the_operator_is_warned(make: Make) -> None:
    cluster = make(2, num_replicas=2)
    one = cluster.scale_well(1)
    assert "num_replicas=2 is reached for 0 of 8 experts" in one.warnings[0]
    two = cluster.scale_well(2)
    assert two.warnings == ()
    assert all(len(hosts) == 2 for hosts in cluster.topology.placement.hosts_of.values())


def test_copies_lie_on_different_machines_where_every_pod_is_a_node(make: Make) -> None:
    spawner = FakeSpawner()
    spawner.num_nodes = 8
    spawner.machines = {f"expert-{number}": machine for number, machine in enumerate("aabbab")}
    cluster = make(4, spawner=spawner, num_replicas=2)
    for num_hosts in (4, 6, 4):
        cluster.scale_well(num_hosts)
        machines = [{spawner.machines[host] for host in on} for on in cluster.topology.placement.hosts_of.values()]
        assert machines == [{"a", "b"}] * NUM_PAIRS, num_hosts


def test_a_host_is_drained_and_its_copies_are_elsewhere_first(make: Make) -> None:
    cluster = make(3)
    operation = cluster.end_of(cluster.control.drain("expert-1", options=ChangeOptions(request_id="d")))
    assert operation.phase is Phase.DONE
    cluster.rest()
    assert cluster.topology.hosts.keys() == {"expert-0", "expert-2"}
    assert cluster.control.drain("expert-1", options=ChangeOptions(request_id="d")) == operation
    with pytest.raises(NotFoundError, match="'expert-1' is no expert host here: expert-0, expert-2 are"):
        cluster.control.drain("expert-1")
    assert cluster.scale_well(3).change.added == ("expert-1",)  # type: ignore[union-attr]


def test_the_only_host_cannot_be_drained(make: Make) -> None:
    with pytest.raises(PreconditionError, match="no expert host"):
        make(1).control.drain("expert-0")


def test_a_dry_run_says_what_would_happen_and_changes_nothing(make: Make) -> None:
    cluster = make(2)
    cluster.spawner.calls.clear()
    dry = cluster.control.scale(5, options=ChangeOptions(validate_only=True, request_id="r"))
    assert {method for _, method in cluster.spawner.calls} <= {"scale", "load_now", "status", "orders"}
    assert cluster.control.operations() == ()
    assert (dry.name, dry.phase, cluster.topology.epoch) == ("", Phase.DONE, 1)
    wet = cluster.scale(5, request_id="r")
    assert dry.change == wet.change, "the dry run tells the truth"


@pytest.mark.parametrize(("num_nodes", "before", "after"), [(1, 3, 4), (2, 2, 4), (3, 3, 6)])
def test_a_dry_run_expects_new_hosts_on_the_emptiest_nodes(make: Make, num_nodes: int, before: int, after: int) -> None:
    spawner = FakeSpawner()
    spawner.num_nodes = num_nodes
    cluster = make(before, spawner=spawner, num_replicas=2)
    dry = cluster.control.scale(after, options=ChangeOptions(validate_only=True))
    wet = cluster.scale(after)
    assert (dry.change, dry.warnings) == (wet.change, wet.warnings)


def test_the_same_request_again_is_the_same_operation(make: Make) -> None:
    cluster = make(2)
    first = cluster.control.scale(3, options=ChangeOptions(request_id="r"))
    assert cluster.control.scale(3, options=ChangeOptions(request_id="r")).name == first.name
    cluster.end_of(first)
    assert cluster.control.scale(3, options=ChangeOptions(request_id="r")).name == first.name
    with pytest.raises(DuplicateRequestError, match="asked for something else"):
        cluster.control.scale(4, options=ChangeOptions(request_id="r"))
    with pytest.raises(DuplicateRequestError, match="asked for something else"):
        cluster.control.rebalance(options=ChangeOptions(request_id="r"))
    cluster.rest()
    assert cluster.topology.epoch == 2


def test_of_many_requests_at_once_one_wins_and_the_others_learn_its_name(make: Make) -> None:
    release = threading.Event()
    cluster = make(2, spawner=FakeSpawner(expert_2__load=lambda: release.wait(5)))
    names, refusals = [], []

    def ask(num_hosts: int) -> None:
        try:
            names.append(cluster.control.scale(num_hosts).name)
        except ConflictError as error:
            refusals.append(error)

    threads = [threading.Thread(target=ask, args=(3 + index % 2,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (name,) = names
    assert [error.metadata["operation"] for error in refusals] == [name] * 5
    assert name in refusals[0].message
    assert cluster.control.view().operation == name
    with pytest.raises(PreconditionError, match="runs"):
        cluster.control.delete(name)
    release.set()
    assert cluster.end_of(cluster.control.operation(name)).phase is Phase.DONE
    cluster.rest()
    cluster.control.delete(name)
    with pytest.raises(NotFoundError, match="no operation"):
        cluster.control.operation(name)


@pytest.mark.parametrize("num_hosts", [0, -1])
def test_a_cluster_without_hosts_is_refused(make: Make, num_hosts: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"num_hosts: {num_hosts}; a cluster keeps at least one"):
        make(2).control.scale(num_hosts)


def test_what_memory_forbids_is_refused_with_figures_and_changes_nothing(make: Make) -> None:
    cluster = make(4, host_capacity_bytes=20)
    with pytest.raises(PreconditionError, match="8 experts of 10 bytes do not fit: 3 hosts have room for 6") as caught:
        cluster.control.scale(3)
    assert caught.value.reason == "INSUFFICIENT_CAPACITY"
    assert cluster.control.operations() == ()
    cluster.rest()


def test_hosts_let_go_only_when_every_attention_worker_has_switched(make: Make) -> None:
    release = threading.Event()
    cluster = make(3)
    cluster.spawner.faults["attention-1.publish"] = lambda: release.wait(5)
    cluster.spawner.calls.clear()
    operation = cluster.control.scale(2)
    wait_until(lambda: cluster.attention().epochs == [1, 2])
    assert cluster.control.operation(operation.name).phase is Phase.COMMITTING
    letting_go = {"keep", "close", "restore", "kill"}
    assert not [call for call in cluster.spawner.calls if call[1] in letting_go]
    release.set()
    assert cluster.end_of(operation).phase is Phase.DONE
    cluster.rest()
    assert [call for call in cluster.spawner.calls if call[1] in letting_go]


def test_the_wait_for_a_slow_attention_worker_is_bounded_and_it_is_told_later(make: Make) -> None:
    cluster = make(3)
    cluster.spawner.faults["attention-1.publish"] = fail(EngineError("cannot switch"))
    ended = cluster.scale(2, drain_timeout_s=0.2)
    assert ended.phase is Phase.DONE
    assert ended.warnings == ("attention-1 has not switched to epoch 2 yet",)
    assert any("lets go" in breach for breach in cluster.spawner.breaches), "rows of it are refused, and sent elsewhere"
    cluster.spawner.breaches.clear()
    cluster.spawner.faults.clear()
    cluster.rest()
    assert cluster.attention(1).epochs == [1, 2]


def test_a_host_of_other_weights_never_serves(make: Make) -> None:
    cluster = make(2)
    poisoned = cluster.spawner.faults
    poisoned["expert-2.fingerprints"] = lambda: setattr(cluster.spawner.workers["expert-2"], "poison", "!")
    ended = cluster.scale(3)
    assert (ended.phase, ended.error_reason, ended.epoch) == (Phase.FAILED, "VERIFICATION_FAILED", 0)
    assert "differs between expert-" in ended.error_message
    assert "expert-2" in cluster.spawner.dead, "it ends when what it started is gone"
    cluster.rest()
    assert cluster.attention().epochs == [1]
    poisoned.clear()
    assert cluster.scale_well(3).epoch == 2


def test_a_host_that_holds_less_than_it_was_told_never_serves(make: Make) -> None:
    cluster = make(2)
    cluster.spawner.faults["expert-2.fingerprints"] = lambda: cluster.spawner.workers["expert-2"].held.clear()  # type: ignore[attr-defined]
    ended = cluster.scale(3)
    assert ended.error_reason == "VERIFICATION_FAILED"
    assert "was to map expert" in ended.error_message
    cluster.rest()


def test_adopted_experts_survive_a_rollback_and_go_with_the_next_epoch(make: Make) -> None:
    cluster = make(2)
    host = cluster.spawner.workers["expert-0"]
    assert isinstance(host, FakeHost)
    foreign = min(set(GEOMETRY.pairs) - host.held)
    host.held.add(foreign)
    host.adopted.add(foreign)
    cluster.spawner.faults["attention-0.connect"] = fail(EngineError("no"))
    assert cluster.scale(1).phase is Phase.FAILED
    assert foreign in host.held
    assert len(host.held) == NUM_PAIRS // 2 + 1
    cluster.spawner.faults.clear()
    cluster.scale_well(3)


def test_a_rebalance_that_does_not_pay_moves_nothing(make: Make) -> None:
    cluster = make(2)
    ended = cluster.end_of(cluster.control.rebalance())
    assert (ended.phase, ended.epoch) == (Phase.DONE, 0)
    assert "nothing was moved" in ended.warnings[0]
    cluster.rest()
    assert cluster.topology.epoch == 1


def test_a_spawn_that_is_refused_or_never_comes_rolls_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch, change__START_TIMEOUT_S=0.3)
    cluster = make(2)

    def refuse(worker: str) -> None:
        if worker == "expert-3":
            raise UnavailableError("no room for expert-3", reason="INSUFFICIENT_CAPACITY")

    cluster.spawner.spawn_fault = refuse
    ended = cluster.scale(4)
    assert (ended.phase, ended.error_message) == (Phase.FAILED, "no room for expert-3")
    cluster.rest()
    release = threading.Event()
    cluster.spawner.spawn_fault = lambda worker: release.wait(5)
    ended = cluster.scale(4)
    assert (ended.phase, ended.error_reason) == (Phase.FAILED, "INSUFFICIENT_CAPACITY")
    assert "expert-2, expert-3 did not start in 0 s: is there room" in ended.error_message
    release.set()  # both come now, too late: they are ended, or taken by whoever wants them then
    cluster.scale_well(3)


# --- every call of every phase -----------------------------------------------------------------------------------

UP, DOWN = (2, 4), (4, 2)
CALLS = {
    UP: [
        *(f"expert-{i}.{method}" for i in (2, 3) for method in ("location", "load")),
        *(f"expert-{i}.fingerprints" for i in range(4)),
        *(f"attention-{i}.connect" for i in (0, 1, 0, 1)),  # the new hosts, then the others
        *(f"attention-{i}.publish" for i in (0, 1)),
        *(f"expert-{i}.keep" for i in range(4)),
    ],
    DOWN: [
        *(f"expert-{i}.add" for i in (0, 1)),
        *(f"expert-{i}.fingerprints" for i in range(4)),
        *(f"attention-{i}.connect" for i in (0, 1, 0, 1)),  # the new hosts, then the others
        *(f"attention-{i}.publish" for i in (0, 1)),
        *(f"expert-{i}.keep" for i in (0, 1)),
        *(f"expert-{i}.close" for i in (2, 3)),
    ],
}
CASES = [(change, call) for change, calls in CALLS.items() for call in dict.fromkeys(calls)]
COMMITTED = ("publish", "keep", "close")
BOUNDS = {  # what bounds the wait for a call that hangs; after a failure, END bounds the wait for those that roll back
    "location": ("START", "END"),
    "load": ("LOAD", "END"),
    "add": ("LOAD", "END"),
    "fingerprints": ("LOAD", "COMMIT"),
    "connect": ("COMMIT",),
    "publish": (),
    "keep": (),
    "close": ("END",),
}


def test_the_list_of_calls_is_complete(make: Make) -> None:
    for (before, after), calls in CALLS.items():
        cluster = make(before)
        life = cluster.spawner.controllers[-1][1]
        del life.made[:]
        cluster.scale_well(after)
        assert sorted(life.made) == sorted(calls)


@pytest.mark.parametrize(("change", "call"), CASES, ids=str)
@pytest.mark.parametrize("fault", ["raises", "dies", "hangs"])
def test_a_fault_in_any_call_ends_in_the_old_state_or_the_new_one(
    make: Make, monkeypatch: pytest.MonkeyPatch, change: tuple[int, int], call: str, fault: str
) -> None:
    bounds = BOUNDS[call.partition(".")[2]] if fault == "hangs" else ()
    hasten(monkeypatch, **{f"change__{bound}_TIMEOUT_S": 0.25 for bound in bounds})
    before, after = change
    cluster = make(before)
    worker, _, method = call.partition(".")
    release = threading.Event()
    faults = {
        "raises": fail(EngineError("broken")),
        "dies": lambda: cluster.spawner.die(worker),
        "hangs": lambda: release.wait(10),
    }
    cluster.spawner.faults[call] = faults[fault]
    old = cluster.topology
    ended = cluster.scale(after, drain_timeout_s=0.25 if fault == "hangs" and not bounds else 5.0)
    sources = ("expert-2", "expert-3") if change == DOWN else ("expert-0", "expert-1")
    forward = method in COMMITTED or (method == "fingerprints" and worker in sources)
    if fault == "dies":  # one that stays, and an attention worker, are spared; their repair follows
        forward = forward or method in ("add", "connect") or (method == "fingerprints" and change == DOWN)
    assert ended.phase is (Phase.DONE if forward else Phase.FAILED), ended
    assert bool(ended.epoch) == forward
    if not forward and fault == "raises":
        cluster.rest()
        assert cluster.topology is old, "rolled back to exactly the old state"
    if method == "publish":  # it had not switched when others let go: its rows are refused there, and sent elsewhere
        cluster.spawner.breaches.clear()
    cluster.spawner.faults.clear()
    release.set()
    if method == "publish":
        wait_until(lambda: all(one.topology_in_use is cluster.topology for one in cluster.spawner.serving()))
        cluster.spawner.breaches.clear()
    if method == "keep" and fault == "raises":
        assert ended.warnings == (f"{worker} did not let go of what is elsewhere now",)
        cluster.scale_well(3)  # lets go
    else:
        cluster.scale_when_free(3)


@pytest.mark.parametrize("change", [UP, DOWN])
@pytest.mark.parametrize("call_index", range(max(map(len, CALLS.values())) + 1))
def test_a_controller_that_dies_at_any_call_leaves_one_truth_to_the_next(
    make: Make, monkeypatch: pytest.MonkeyPatch, change: tuple[int, int], call_index: int
) -> None:
    hasten(monkeypatch, change__START_TIMEOUT_S=2.0)
    before, after = change
    cluster = make(before)
    old = cluster.topology
    first, life = cluster.spawner.controllers[-1]
    life.dies_at = life.num_calls + call_index
    cluster.control.scale(after)
    wait_until(lambda: life.over or not first.ledger.running)
    cluster.spawner.die("controller")
    wait_until(lambda: cluster.spawner.controller is not first)
    cluster.rest()
    assert cluster.topology.epoch in (1, 2)
    assert len(cluster.topology.hosts) == (before if cluster.topology.epoch == 1 else after)
    assert cluster.topology == old or cluster.topology.epoch == 2
    cluster.scale_when_free(3)


PHASES = {
    Phase.PROVISIONING: "expert-2.location",
    Phase.LOADING: "expert-2.load",
    Phase.VERIFYING: "expert-2.fingerprints",
    Phase.COMMITTING: "attention-0.publish",
    Phase.DRAINING: "expert-0.keep",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_cancelled_operation_rolls_back_until_it_commits_and_goes_on_after(make: Make, phase: Phase) -> None:
    cluster, release, reached = make(2), threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        release.wait(5)

    cluster.spawner.faults[PHASES[phase]] = hold
    old = cluster.topology
    operation = cluster.control.scale(4)
    assert reached.wait(60)
    assert cluster.control.operation(operation.name).phase is phase
    cluster.control.cancel(operation.name)
    cluster.control.cancel(operation.name)
    if phase in (Phase.COMMITTING, Phase.DRAINING):
        release.set()
        ended = cluster.end_of(operation)
        assert ended.phase is Phase.DONE
        (warning,) = ended.warnings
        assert "too late" in warning
        cluster.rest()
        assert len(cluster.topology.hosts) == 4
    else:
        wait_until(lambda: cluster.control.operation(operation.name).phase is not phase)
        release.set()
        ended = cluster.end_of(operation)
        assert (ended.phase, ended.error_reason, ended.epoch) == (Phase.CANCELLED, "CANCELLED", 0)
        cluster.rest()
        assert cluster.topology is old
    cluster.control.cancel(operation.name)
    cluster.spawner.faults.clear()
    cluster.scale_well(3)


def test_an_operation_waiting_for_processes_can_be_cancelled(make: Make) -> None:
    cluster, release = make(2), threading.Event()
    cluster.spawner.spawn_fault = lambda worker: release.wait(5)
    operation = cluster.control.scale(3)
    wait_until(lambda: cluster.control.operation(operation.name).phase is Phase.PROVISIONING)
    cluster.control.cancel(operation.name)
    wait_until(lambda: cluster.control.operation(operation.name).phase is Phase.CANCELLED)
    assert cluster.spawner.workers.keys() == {"expert-0", "expert-1", "attention-0", "attention-1"}
    release.set()
    wait_until(lambda: "expert-2" in cluster.spawner.dead)  # it came late, and was ended
    cluster.scale_well(3)


def test_closing_while_processes_start_leaves_none(make: Make) -> None:
    cluster, release = make(2), threading.Event()
    cluster.spawner.spawn_fault = lambda worker: release.wait(5)
    cluster.control.scale(3)
    wait_until(lambda: cluster.processes._starting)
    cluster.close()
    release.set()
    wait_until(lambda: "expert-2" in cluster.spawner.ended)
    with pytest.raises(UnavailableError, match="closed"):
        cluster.control.view()


def test_a_process_that_comes_while_there_is_no_controller_is_not_forgotten(make: Make) -> None:
    cluster, release, listed = make(2), threading.Event(), threading.Event()
    cluster.spawner.spawn_fault = lambda worker: release.wait(5)

    def let_it_come(life: object) -> None:
        release.set()  # the next controller was told who there is; then one more comes
        wait_until(lambda: "expert-2" in cluster.processes._workers)
        listed.set()

    cluster.spawner.next_life = let_it_come
    cluster.control.scale(3)
    wait_until(lambda: cluster.processes._starting)
    cluster.spawner.die("controller")
    assert listed.wait(60)
    cluster.rest()
    assert "expert-2" in cluster.spawner.dead
    assert {handle.worker for handle in cluster.spawner.controller.members.of(Role.EXPERT)} == {"expert-0", "expert-1"}
