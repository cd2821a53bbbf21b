"""Texts to be scored, a chunk of the first at a time, between steps; called by the engine's thread only."""

from collections import deque
from concurrent.futures import Future

from llama4_dist.engine import scorer
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.scorer import ScoreJob
from llama4_dist.errors import EngineError, Llama4Error


class ScoreQueue:
    """First come, first served. Each job's future is done when all its logits are there, or says why they are not."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._jobs: deque[tuple[ScoreJob, Future[None]]] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: ScoreJob, done: Future[None]) -> None:
        self._jobs.append((job, done))

    def advance(self) -> None:
        """Score the next chunk, if there is one; an error ends its job, and running requests go on."""
        if not self._jobs:
            return
        job, done = self._jobs[0]
        try:
            scorer.advance(self._core, job)
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            done.set_exception(error if isinstance(error, Llama4Error) else EngineError(f"scoring failed: {error}"))
        if job.done:
            done.set_result(None)
        if done.done():
            self._jobs.popleft()
            self._core.scheduler.give_back(job.owner)

    def drop(self) -> None:
        """Take back the pages of all jobs; whoever waits for them is told by the caller."""
        for job, _ in self._jobs:
            self._core.scheduler.give_back(job.owner)
        self._jobs.clear()
