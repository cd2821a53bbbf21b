"""From when on a reply is overdue."""

import pytest

from llama4_dist.dispatch.reply_times import ENOUGH, Deadlines, ReplyTimes

DEADLINES = Deadlines(hedge_floor_s=0.02, hedge_factor=5.0, lose_floor_s=1.0, lose_factor=20.0)


def times(**seconds: float) -> ReplyTimes:
    """Hosts that answer single rows in so many seconds."""
    known = ReplyTimes(DEADLINES)
    for _ in range(40):
        for host, taken in seconds.items():
            known.observe(host, 1, taken)
    return known


def test_a_host_that_nobody_knows_gets_time_for_its_first_rows() -> None:
    assert ReplyTimes(DEADLINES).hedge_after_s(1) == DEADLINES.unknown_hedge_s
    assert ReplyTimes(DEADLINES).lose_after_s(1) == DEADLINES.unknown_lose_s


def test_a_few_replies_are_not_believed() -> None:
    known = ReplyTimes(DEADLINES)
    for _ in range(ENOUGH - 1):
        known.observe("a", 1, 0.001)
    assert known.usual_s(1) is None
    known.observe("a", 1, 0.001)
    assert known.usual_s(1) == 0.001


def test_the_deadline_is_a_multiple_of_what_is_usual_but_not_below_the_floor() -> None:
    assert times(a=0.001).hedge_after_s(1) == 0.02
    assert times(a=0.01).hedge_after_s(1) == pytest.approx(0.05)
    assert times(a=0.01).lose_after_s(1) == 1.0
    assert times(a=0.1).lose_after_s(1) == pytest.approx(2.0)


def test_one_slow_host_does_not_move_what_is_usual() -> None:
    assert times(a=0.01, b=0.5).usual_s(1) == 0.01
    assert times(a=0.01, b=0.012, c=0.5).usual_s(1) == 0.012


def test_a_slower_machine_does() -> None:
    known = times(a=0.01, b=0.01)
    for _ in range(200):
        known.observe("a", 1, 0.1)
        known.observe("b", 1, 0.1)
    assert known.usual_s(1) == 0.1


def test_more_rows_may_take_longer() -> None:
    known = times(a=0.01)
    assert known.usual_s(1024) == pytest.approx(0.01 * 2**10)
    for _ in range(ENOUGH):
        known.observe("a", 1024, 0.2)
    assert known.usual_s(1024) == 0.2
    assert known.usual_s(64) == pytest.approx(0.01 * 2**6)


def test_fewer_rows_than_any_known_take_no_longer_than_those() -> None:
    known = ReplyTimes(DEADLINES)
    for _ in range(ENOUGH):
        known.observe("a", 64, 0.2)
    assert known.usual_s(1) == 0.2


@pytest.mark.parametrize(
    "wrong",
    [
        {"hedge_floor_s": 2.0},
        {"hedge_floor_s": 0.0},
        {"unknown_hedge_s": 20.0},
        {"hedge_factor": 0.5},
        {"lose_factor": 2.0},
    ],
)
def test_deadlines_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Deadlines(**wrong)
