"""How rounds become figures, and what counts as agreement."""

import os
from collections.abc import Iterator

import pytest

from benchmarks import quiet
from benchmarks.quiet import Usage, others_share, undisturbed
from benchmarks.workloads import Speed, agreement, decode, equal_in_a_row, prefill, ratios


def test_prompts_differ_between_rounds_and_are_the_same_for_all_contenders() -> None:
    workload = decode(4, 8)
    first = workload.prompts(0, 100)
    assert first == workload.prompts(0, 100)
    assert first != workload.prompts(1, 100)
    assert [len(prompt) for prompt in first] == [32] * 4
    assert all(0 <= token < 100 for prompt in first for token in prompt)
    assert [len(prompt) for prompt in prefill(512).prompts(0, 100)] == [512]


@pytest.mark.parametrize(("theirs", "expected"), [([5, 6, 7], 3), ([5, 6, 8], 2), ([5, 9, 7], 1), ([4, 6, 7], 0)])
def test_tokens_count_up_to_the_first_difference(theirs: list[int], expected: int) -> None:
    assert equal_in_a_row([5, 6, 7], theirs) == expected


def test_agreement_counts_first_tokens_and_rows() -> None:
    found = agreement([([1, 2], [1, 2]), ([3, 4], [3, 9]), ([5, 6], [7, 6])])
    assert (found.num_first_equal, found.num_sequences) == (2, 3)
    assert (found.num_equal, found.num_tokens) == (3, 6)
    assert found.first_share == pytest.approx(2 / 3)


def test_ratios_are_of_medians() -> None:
    speeds = {"ours": {"w": Speed(rounds=(1.0, 30.0, 20.0))}, "other": {"w": Speed(rounds=(10.0, 99.0, 5.0))}}
    assert ratios(speeds, "ours") == {"other": {"w": 2.0}}


def test_what_others_took_is_what_was_busy_without_us() -> None:
    before, after = Usage(total_s=100.0, busy_s=40.0), Usage(total_s=110.0, busy_s=49.0)
    assert others_share(before, after, own_s=8.0) == pytest.approx(0.1)
    assert others_share(before, after, own_s=9.5) == 0.0
    assert others_share(before, before, own_s=0.0) == 0.0


def test_a_disturbed_run_is_taken_again_and_the_quietest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def readings(busy: list[float]) -> Iterator[Usage]:
        for index, busy_s in enumerate(busy):
            yield Usage(total_s=10.0 * index, busy_s=0.0)
            yield Usage(total_s=10.0 * index + 10, busy_s=busy_s)

    def measured(busy: list[float]) -> tuple[int, object, list[float]]:
        pauses: list[float] = []
        usages, runs = readings(busy), iter(range(9))
        monkeypatch.setattr(quiet.Usage, "now", lambda: next(usages))
        monkeypatch.setattr(quiet, "processor_seconds", lambda pid: 0.0)
        run, share = undisturbed(lambda: next(runs), (os.getpid(),), sleep=pauses.append)
        return run, share, pauses

    assert measured([3.0, 2.0, 0.4, 1.0]) == (2, pytest.approx(0.04), [0.0, 0.1, 0.3])
    never = [3.0, 2.0, 4.0, 1.0, 5.0, 2.0]
    assert measured(never) == (3, pytest.approx(0.1), list(quiet.PAUSES_S))
