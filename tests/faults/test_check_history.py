"""The checker passes every good history, fails every spoilt one, measures stalls by hand-checkable numbers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_dist.chaos.history.events import Event, EventKind, HistoryError, parse, read_history
from llama4_dist.chaos.history.reference import Reference, read_reference
from llama4_dist.chaos.history.verdict import Rules, judge
from tests.faults.histories import SPOILS, Events, good_history, reference_for, timed
from tools.check_history import main

FOLDER = Path(__file__).parent / "recorded"
ROOT = Path(__file__).parents[2]
SEEDS = st.integers(0, 2**32)
NO_RULES = Rules()


def kinds(events: Events, reference: Reference | None = None, rules: Rules = NO_RULES) -> set[str]:
    lines = [parse(event.line(), "line") for event in events]
    return {one.kind for one in judge(lines, reference, rules).violations}


@given(seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_a_good_history_passes(seed: int) -> None:
    events = good_history(Random(seed))
    assert kinds(events, reference_for(events)) == set()


@pytest.mark.parametrize("name", SPOILS)
@given(seed=SEEDS)
@settings(max_examples=150, deadline=None)
def test_every_spoilt_history_is_caught(name: str, seed: int) -> None:
    random = Random(seed)
    events = good_history(random)
    spoilt = SPOILS[name](events, random)
    if spoilt is not None:
        assert kinds(timed(spoilt), reference_for(events)), f"{name} was not caught"


def test_each_promise_has_its_own_name() -> None:
    random = Random(5)
    events = good_history(random)
    expected = {
        "a wrong token": "wrong_token",
        "a token twice": "order",
        "swapped tokens": "order",
        "two ends": "second_end",
        "a token after the end": "after_end",
    }
    for name, kind in expected.items():
        spoilt = SPOILS[name](events, random)
        assert spoilt is not None
        assert kind in kinds(timed(spoilt), reference_for(events)), name


def test_a_token_lost_between_two_attempts_is_missed_without_a_reference() -> None:
    events = [
        *request("a", [1.0], end=EventKind.ERROR, reason="LOST"),
        Event(kind=EventKind.SUBMITTED, t_s=2.0, seed=1, request_id="a", attempt=1, prompt=(1,), sampling={}),
        Event(kind=EventKind.STARTED, t_s=2.0, seed=1, request_id="a", attempt=1, position=2),
        Event(kind=EventKind.TOKEN, t_s=2.0, seed=1, request_id="a", attempt=1, index=0, position=2, token_id=7),
        Event(kind=EventKind.FINISHED, t_s=2.0, seed=1, request_id="a", attempt=1, index=0),
    ]
    assert kinds(events) == {"order"}


def test_a_writer_of_an_earlier_attempt_is_called_late_and_a_second_submission_by_its_name() -> None:
    first = request("a", [1.0], end=EventKind.ERROR, reason="LOST")
    second = [replace(event, attempt=1, t_s=event.t_s + 1) for event in request("a", [1.0])]
    assert kinds([*first, *second]) == set()
    assert kinds([*first, *second, replace(first[1], t_s=3.0)]) == {"late"}
    assert "not_submitted" in kinds([*first, replace(first[0], t_s=3.0)])


def request(name: str, times_s: list[float], *, end: EventKind = EventKind.FINISHED, **extra: Any) -> Events:
    """A request that gets token 7 at each moment and then ends."""
    who: dict[str, Any] = {"seed": 1, "request_id": name}
    index = 0 if end is EventKind.FINISHED else None
    begin_s, end_s = (times_s[0] - 0.5, times_s[-1]) if times_s else (0.0, 0.0)
    return [
        Event(kind=EventKind.SUBMITTED, t_s=begin_s, prompt=(1,), sampling={"max_tokens": len(times_s)}, **who),
        *(
            Event(kind=EventKind.TOKEN, t_s=t_s, index=0, position=position, token_id=7, **who)
            for position, t_s in enumerate(times_s)
        ),
        Event(kind=end, t_s=end_s, index=index, extra=extra, **who),
    ]


def fault(number: int, injected_s: float, healed_s: float, *, phase: str = "decode", verified: bool = True) -> Events:
    extra = {"number": number, "name": "kill", "phase": phase}
    moments = {EventKind.FAULT_INJECTED: injected_s, EventKind.FAULT_HEALED: healed_s}
    if verified:
        moments[EventKind.FAULT_VERIFIED] = injected_s
    return [Event(kind=kind, t_s=t_s, seed=1, extra=extra) for kind, t_s in moments.items()]


def in_time(*parts: Events) -> Events:
    return sorted((event for part in parts for event in part), key=lambda event: event.t_s)


def test_a_stall_is_the_gap_under_the_fault_less_the_fault_free_p99() -> None:
    steady = [1.0 + step / 10 for step in range(10)]  # gaps of 0.1 s
    stalled = [1.0, 1.1, 1.6, 1.7]  # 0.5 s from 1.1 on
    events = in_time(request("steady", steady), request("stalled", stalled), fault(1, 1.15, 1.2))
    verdict = judge(events, None, Rules())
    assert verdict.gaps.count == 12
    assert verdict.gaps.max_s == pytest.approx(0.5)
    assert verdict.healthy_gaps.p99_s == pytest.approx(0.1)
    assert verdict.fault_gaps.count == 3, "the stalled stream's gap, and two of the steady one: 1.1-1.2 and 1.2-1.3"
    assert verdict.added_stall.max_s == pytest.approx(0.4)
    assert verdict.longest_gaps == pytest.approx({"steady": 0.1, "stalled": 0.5})
    [effect] = verdict.faults
    assert effect.num_stalled == 1
    assert effect.recovery_s == pytest.approx(1.6 - 1.15)
    assert verdict.first_token.p50_s == pytest.approx(0.5)
    assert kinds(events, None, Rules(max_added_stall_s=0.39)) == {"stall"}
    assert kinds(events, None, Rules(max_added_stall_s=0.41)) == set()


def test_a_reference_history_gives_the_fault_free_gaps() -> None:
    calm = request("calm", [1.0, 1.2, 1.4])
    events = in_time(request("r", [1.0, 1.3, 2.0]), fault(1, 1.5, 1.6))
    verdict = judge(events, Reference(tokens={}, events=calm), Rules())
    assert verdict.healthy_gaps.p99_s == pytest.approx(0.2)
    assert verdict.added_stall.max_s == pytest.approx(0.5)


def test_tokens_that_came_together_and_tokens_given_again_make_no_gap() -> None:
    events = request("r", [1.0, 1.0, 1.5])
    again = [
        Event(kind=EventKind.ERROR, t_s=1.6, seed=1, request_id="r", extra={"reason": "LOST"}),
        Event(kind=EventKind.SUBMITTED, t_s=1.7, seed=1, request_id="r", attempt=1, prompt=(1,), sampling={}),
        *(
            Event(kind=EventKind.TOKEN, t_s=t_s, seed=1, request_id="r", attempt=1, index=0, position=place, token_id=7)
            for place, t_s in enumerate([1.8, 1.8, 1.9, 2.0])
        ),
        Event(kind=EventKind.FINISHED, t_s=2.0, seed=1, request_id="r", attempt=1, index=0),
    ]
    verdict = judge([*events[:-1], *again], None, Rules())
    assert verdict.violations == []
    assert verdict.gaps.count == 2
    assert verdict.gaps.max_s == pytest.approx(0.5)


def test_faults_count_by_phase_once_verified_and_required_phases_must_be_hit() -> None:
    some = request("r", [1.0, 1.1])
    events = in_time(some, fault(1, 1.0, 1.1), fault(2, 1.0, 1.1), fault(3, 1.0, 1.1, phase="load", verified=False))
    verdict = judge(events, None, Rules(required_phases=("decode", "prefill")))
    assert verdict.phases == {"decode": 2}
    assert {one.kind for one in verdict.violations} == {"unverified_fault", "phase_missing"}


def test_refusals_and_failures_are_violations_unless_allowed() -> None:
    refused = request("a", [], end=EventKind.ERROR, reason="QUEUE_FULL")
    failed = request("b", [1.0], end=EventKind.ERROR, reason="UNAVAILABLE")
    assert kinds(in_time(refused, failed)) == {"refused", "failed"}
    assert kinds(in_time(refused, failed), None, Rules(allowed_errors=frozenset({"QUEUE_FULL"}))) == {"failed"}


def test_a_cancelled_request_may_be_short_but_never_wrong() -> None:
    events = request("a", [1.0, 1.1], end=EventKind.CANCELLED)
    key = json.dumps([[1], {"max_tokens": 2}])
    assert kinds(events, Reference(tokens={key: ((7, 7, 7),)})) == set()
    assert kinds(events, Reference(tokens={key: ((7, 8, 7),)})) == {"wrong_token"}
    assert kinds(events, Reference(tokens={})) == {"no_reference"}


def test_a_server_that_cancels_by_itself_and_a_run_without_requests_do_not_pass() -> None:
    assert kinds(request("a", [1.0], finish_reason="cancelled")) == {"failed"}
    assert kinds(fault(1, 1.0, 1.1)) == {"empty"}


def test_an_operation_that_never_ended_is_a_violation() -> None:
    started = Event(kind=EventKind.OPERATION_STARTED, t_s=1.0, seed=1, extra={"number": 1, "name": "scale"})
    assert kinds(in_time(request("a", [1.0]), [started])) == {"open_operation"}


def write(path: Path, events: Events) -> Path:
    path.write_text("".join(event.line() for event in events))
    return path


def test_a_reference_run_must_itself_be_clean_and_of_one_mind(tmp_path: Path) -> None:
    clean = write(tmp_path / "clean", in_time(request("a", [1.0]), request("b", [2.0])))
    assert read_reference(clean).of((1,), {"max_tokens": 1}) == ((7,),)
    torn = in_time(request("a", [1.0]), request("b", [2.0]))
    changed = [
        Event(kind=one.kind, t_s=one.t_s, seed=1, request_id="b", index=0, position=0, token_id=8)
        if one.kind is EventKind.TOKEN and one.request_id == "b"
        else one
        for one in torn
    ]
    for name, events, match in (
        ("torn", changed, "different tokens"),
        ("faulty", in_time(request("a", [1.0]), fault(1, 1.0, 1.1)), "without faults"),
        ("lost", request("a", [1.0])[:-1], "never ended"),
    ):
        with pytest.raises(HistoryError, match=match):
            read_reference(write(tmp_path / name, events))


def test_files_of_several_clients_are_merged_by_time(tmp_path: Path) -> None:
    one = write(tmp_path / "one", request("a", [1.0, 3.0]))
    two = write(tmp_path / "two", request("b", [2.0, 2.5]))
    times_s = [event.t_s for event in read_history([one, two])]
    assert times_s == sorted(times_s)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"format":99,"t":1,"seed":1,"event":"epoch"}', "format 99 is not one of"),
        ('{"format":1,"t":1,"seed":1,"event":"exploded"}', "exploded"),
        ('{"format":1,"t":1,"seed":1,"event":"token","request_id":"a"}', "token without index, position, token_id"),
        ('{"format":1,"t":1,"seed":1,"event":"error"}', "error without request_id"),
        ("[1]", "no event"),
        ("nonsense", "no event"),
        ('{"format":1,"t":5,"seed":1,"event":"epoch"}\n{"format":1,"t":4,"seed":1,"event":"epoch"}', "backwards"),
    ],
)
def test_what_is_no_history_is_refused_with_its_line(
    tmp_path: Path, line: str, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "history"
    path.write_text(line + "\n")
    with pytest.raises(HistoryError, match=match):
        read_history([path])
    assert main([str(path), "--without-reference"]) == 2
    assert f"{path}:" in capsys.readouterr().err


def test_recorded_files_of_format_1_are_judged_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(FOLDER / "format-1.jsonl"), "--reference", str(FOLDER / "format-1-reference.json")]
    assert main([*files, "--json", "--require-phase", "decode"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert found["outcomes"] == {"finished": 3}
    assert found["num_compared"] == 3
    assert found["phases"] == {"decode": 1}
    assert main(files) == 0
    assert "kept every promise" in capsys.readouterr().out


def test_the_program_stands_alone_and_fails_what_is_lost(tmp_path: Path) -> None:
    lines = (FOLDER / "format-1.jsonl").read_text().splitlines(keepends=True)
    lost = tmp_path / "lost.jsonl"
    lost.write_text("".join(line for line in lines if '"finished"' not in line))
    done = subprocess.run(
        [sys.executable, "tools/check_history.py", str(lost), "--reference", str(FOLDER / "format-1-reference.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "lost r0" in done.stdout
    assert "Traceback" not in done.stderr
