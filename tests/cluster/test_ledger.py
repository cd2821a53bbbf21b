"""The book of operations: one at a time, found again by request id, ended once, cancelled until it is too late."""

import threading

import pytest

from cluster.control_plane.ledger import CANCELLED_TOO_LATE, MAX_KEPT, OperationLedger
from cluster.operation import ChangeOptions, Kind, Phase
from llama4_dist.errors import (
    ConflictError,
    DuplicateRequestError,
    EngineError,
    NotFoundError,
    PreconditionError,
    RequestCancelledError,
)


def begun(ledger: OperationLedger, request_id: str = "") -> str:
    return ledger.begin(Kind.SCALE, 3, ChangeOptions(request_id=request_id)).name


def test_one_operation_at_a_time_and_the_refusal_names_it() -> None:
    ledger = OperationLedger("p")
    name = begun(ledger)
    assert (ledger.running, name) == (name, "operations/p-1")
    with pytest.raises(ConflictError, match=name) as caught:
        begun(ledger)
    assert caught.value.metadata["operation"] == name
    ledger.end(name)
    assert ledger.running == ""
    assert begun(ledger) == "operations/p-2"


def test_an_operation_ends_as_what_ended_it() -> None:
    ledger = OperationLedger("p")
    assert ledger.end(begun(ledger)).phase is Phase.DONE
    assert ledger.end(begun(ledger), RequestCancelledError("stop")).phase is Phase.CANCELLED
    failed = ledger.end(begun(ledger), EngineError("broken", reason="WHY"))
    assert (failed.phase, failed.error_reason, failed.error_message) == (Phase.FAILED, "WHY", "broken")
    assert failed.ended_s is not None
    assert failed.ended_s >= failed.started_s > 0
    assert [one.phase for one in ledger.list()] == [Phase.FAILED, Phase.CANCELLED, Phase.DONE]


def test_a_request_id_finds_its_operation_and_no_other() -> None:
    ledger = OperationLedger("p")
    name = begun(ledger, "r")
    repeated = ledger.repeated(Kind.SCALE, 3, "r")
    assert repeated is not None
    assert repeated.name == name
    assert ledger.repeated(Kind.SCALE, 3, "other") is ledger.repeated(Kind.SCALE, 3, "") is None
    for kind, asked in ((Kind.SCALE, 4), (Kind.DRAIN, 3)):
        with pytest.raises(DuplicateRequestError, match=f"r began {name}"):
            ledger.repeated(kind, asked, "r")


@pytest.mark.parametrize("phase", list(Phase))
def test_cancelling_works_until_the_epoch_is_published(phase: Phase) -> None:
    ledger = OperationLedger("p")
    name = begun(ledger)
    ledger.update(name, phase=phase)
    ledger.cancel(name)
    ledger.cancel(name)
    too_late = phase in (Phase.COMMITTING, Phase.DRAINING)
    assert ledger.get(name).warnings == ((CANCELLED_TOO_LATE,) if too_late else ())
    if too_late:
        ledger.check_cancelled(name)
        ledger.enter(name, Phase.DRAINING)
    else:
        with pytest.raises(RequestCancelledError, match=f"{name} was cancelled"):
            ledger.enter(name, Phase.COMMITTING)
        assert ledger.get(name).phase is phase, "it did not enter the phase"


def test_waiting_ends_with_the_operation_or_with_the_time() -> None:
    ledger = OperationLedger("p")
    name = begun(ledger)
    assert ledger.wait(name, 0.01).phase is Phase.PLANNING
    ended: list[Phase] = []
    waiter = threading.Thread(target=lambda: ended.append(ledger.wait(name, 30).phase))
    waiter.start()
    ledger.end(name)
    waiter.join(60)
    assert ended == [Phase.DONE]


def test_ended_operations_are_kept_up_to_a_bound_and_may_be_forgotten_before() -> None:
    ledger = OperationLedger("p")
    for _ in range(MAX_KEPT + 3):
        ledger.end(begun(ledger))
    assert len(ledger.list()) == MAX_KEPT
    newest = ledger.list()[0].name
    ledger.delete(newest)
    for forget in (ledger.get, ledger.delete, ledger.cancel):
        with pytest.raises(NotFoundError, match=newest):
            forget(newest)
    running = begun(ledger)
    with pytest.raises(PreconditionError, match="cancel it") as caught:
        ledger.delete(running)
    assert caught.value.reason == "OPERATION_RUNNING"
