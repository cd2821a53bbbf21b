"""Streams that never cease while something is broken, and the judgement of what they were given; breaks nothing."""

import itertools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from llama4_dist.chaos.history.events import EventKind, read_file, reference_key
from llama4_dist.chaos.history.recorder import History, changed_fields
from llama4_dist.chaos.history.reference import Reference
from llama4_dist.chaos.history.verdict import Rules, Verdict, judge
from llama4_dist.engine.port import Engine, is_last
from llama4_dist.request import EngineRequest, TokenOutput
from tests.faults.engine_history import EngineHistory
from tests.waiting import PATIENCE_S

SEED = 11


class Load:
    """One stream per case; when its request ends, the same begins again, on the next engine."""

    def __init__(self, engines: Sequence[Engine], cases: Sequence[EngineRequest], reference: Reference, path: Path):
        self.history = History(path, seed=SEED)
        self._reference = reference
        self._cases = cases
        self._numbers = itertools.count()
        self._ended: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._num_tokens = Counter[int]()  # by case
        self._num_done = Counter[int]()
        self._stopping = False
        self._ways = [(engine, EngineHistory(self.history, self._collect)) for engine in engines]
        for engine, recorded in self._ways:
            engine.start(recorded)
        self._feeder = threading.Thread(target=self._feed, name="load", daemon=True)
        self._feeder.start()

    def start(self) -> "Load":
        """Begin every stream."""
        for index in range(len(self._cases)):
            self._ended.put(index)
        return self

    def wait_for_tokens(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Wait until every stream got so many tokens from now on."""
        with self._changed:
            wanted = {index: self._num_tokens[index] + count for index in range(len(self._cases))}
        self._wait(lambda: all(self._num_tokens[i] >= n for i, n in wanted.items()), f"{count} more tokens", timeout_s)

    def wait_for_ends(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Wait until every stream has had so many requests end."""
        indices = range(len(self._cases))
        self._wait(lambda: all(self._num_done[index] >= count for index in indices), f"{count} ends", timeout_s)

    def end(self, *, allowed_errors: Collection[str] = (), label: str = "", since_s: float = 0.0) -> Verdict:
        """Let what runs end, judge all, print the figures; AssertionError lists every promise broken.

        `since_s` leaves out requests submitted before: what they were told when a host lied is not judged.
        """
        self._stop()
        events = read_file(self.history.path)
        early = {event.request_id for event in events if event.kind is EventKind.SUBMITTED and event.t_s < since_s}
        judged = [event for event in events if event.request_id not in early]
        verdict = judge(judged, self._reference, Rules(allowed_errors=frozenset(allowed_errors)))
        if label:
            print(
                f"\n{label}: stall {verdict.added_stall.max_s * 1e3:.0f} ms beyond the fault-free p99 of"
                f" {verdict.healthy_gaps.p99_s * 1e3:.1f} ms, {verdict.num_tokens} tokens, {dict(verdict.outcomes)}"
            )
        assert verdict.violations == []
        assert verdict.num_compared == sum(verdict.outcomes.values()) > 0, "a request has no reference"
        assert allowed_errors or set(verdict.outcomes) == {"finished"}, verdict.outcomes
        return verdict

    def close(self) -> None:
        self._stop()
        self.history.close()

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._ended.put(None)
        self._feeder.join()
        for _, recorded in self._ways:
            recorded.wait(PATIENCE_S)

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        with self._changed:
            met = self._changed.wait_for(condition, timeout_s)
            assert met, f"no {what} in {timeout_s} s: {dict(self._num_tokens)}, ended {dict(self._num_done)}"

    def _feed(self) -> None:
        while (index := self._ended.get()) is not None and not self._stopping:
            number = next(self._numbers)
            engine, recorded = self._ways[number % len(self._ways)]
            recorded.submit(engine, replace(self._cases[index], request_id=f"case{index}-{number}"))

    def _collect(self, outputs: Sequence[TokenOutput]) -> None:
        with self._changed:
            for output in outputs:
                index = int(output.request_id.removeprefix("case").split("-")[0])
                self._num_tokens[index] += len(output.token_ids)
                if is_last(output):
                    self._num_done[index] += 1
                    self._ended.put(index)
            self._changed.notify_all()


def reference_of(cases: Sequence[EngineRequest], tokens: Sequence[tuple[int, ...]]) -> Reference:
    """Say what each case must be answered."""
    return Reference(
        tokens={
            reference_key(case.prompt_token_ids, changed_fields(case.sampling)): (said,)
            for case, said in zip(cases, tokens, strict=True)
        }
    )
