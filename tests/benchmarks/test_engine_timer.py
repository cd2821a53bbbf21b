"""What counts as a decode: steps in which every sequence has a token, however far apart their prompts began."""

import threading
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace

import pytest

import benchmarks.engine_timer
from benchmarks.engine_timer import EngineTimer
from llama4_dist.errors import UnavailableError
from llama4_dist.request import EngineRequest, FinishReason, TokenOutput


class Staggered:
    """An engine whose n-th sequence begins `apart` steps after the one before; a step takes a second a sequence."""

    def __init__(self, num_sequences: int, *, apart: int, fails_at: int | None = None) -> None:
        self.limits = SimpleNamespace(max_context=1000)
        self.now_s = 0.0
        self._num_sequences, self._apart, self._fails_at = num_sequences, apart, fails_at
        self._requests: list[EngineRequest] = []
        self._aborted: set[str] = set()

    def perf_counter(self) -> float:
        return self.now_s

    def start(self, on_outputs) -> None:
        self._on_outputs = on_outputs

    def submit(self, request: EngineRequest) -> None:
        self._requests.append(request)
        if len(self._requests) == self._num_sequences:
            requests, self._requests = self._requests, []
            threading.Thread(target=self._run, args=(requests,)).start()

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    def _run(self, requests: list[EngineRequest]) -> None:
        left = {request.request_id: request.sampling.max_tokens or 0 for request in requests}
        for step in count():
            outputs = list(self._step(requests, left, step))
            self.now_s += len(outputs)
            self._on_outputs(outputs)
            if not left:
                return

    def _step(self, requests: list[EngineRequest], left: dict[str, int], step: int) -> Iterator[TokenOutput]:
        for index, request in enumerate(requests):
            one = request.request_id
            if one in self._aborted and left.pop(one, 0):
                yield TokenOutput(request_id=one, finish_reason=FinishReason.CANCELLED)
            elif one in left and step == self._fails_at:
                del left[one]
                yield TokenOutput(request_id=one, error=UnavailableError("no expert"))
            elif one in left and step >= index * self._apart:
                left[one] -= 1
                if not left[one]:
                    del left[one]
                ended = FinishReason.LENGTH if one not in left else None
                yield TokenOutput(request_id=one, token_ids=(step,), finish_reason=ended)


def timed(engine: Staggered, monkeypatch: pytest.MonkeyPatch) -> EngineTimer:
    monkeypatch.setattr(benchmarks.engine_timer, "time", engine)
    return EngineTimer(engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("apart", [0, 1, 5])
def test_steps_of_a_part_of_the_batch_are_not_counted(apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = timed(Staggered(4, apart=apart), monkeypatch)
    for _ in range(2):
        decoded = timer.decode([[1, 2, 3]] * 4, 8)
        assert (decoded.num_tokens, decoded.seconds) == (4 * 8, 4 * 8), "steps in which not all had a token"
        assert decoded.token_ids == [list(range(index * apart, index * apart + 8)) for index in range(4)]


def test_a_prompt_is_timed_to_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = timed(Staggered(1, apart=0), monkeypatch)
    prefilled = timer.prefill([1, 2, 3])
    assert (prefilled.num_tokens, prefilled.seconds, prefilled.token_ids) == (3, 1.0, [[0]])


def test_a_request_that_fails_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = timed(Staggered(4, apart=1, fails_at=6), monkeypatch)
    with pytest.raises(SystemExit, match="no expert"):
        timer.decode([[1]] * 4, 100)
