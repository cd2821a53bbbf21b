"""A contender's side of the pipe: one JSON line in, one out. Needs the standard library only: it runs in any venv."""

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO

PR_SET_PDEATHSIG = 1  # linux/prctl.h
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """`seconds` that `num_tokens` tokens took, and all tokens that each prompt was continued with."""

    seconds: float
    num_tokens: int
    token_ids: Sequence[Sequence[int]]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds


class Model(Protocol):
    """What a contender computes; greedy, and without regard to ends of sequence."""

    version: str

    def prefill(self, prompt: Sequence[int]) -> Timed:
        """Time a prompt until its next token is known; count the prompt's tokens."""
        ...

    def decode(self, prompts: Prompts, num_tokens: int) -> Timed:
        """Continue each prompt by `num_tokens`; time and count from the moment all have their first one."""
        ...


def take_stdout() -> int:
    """Return a descriptor of the pipe; what libraries print from now on goes to the standard error."""
    if sys.platform == "linux":  # a stopped process would outlive a parent that was killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    pipe = os.dup(1)
    os.dup2(2, 1)
    return pipe


def answer(model: Model, pipe: int) -> None:
    """Answer until the parent closes its end."""
    with os.fdopen(pipe, "w") as out:
        _write(out, {"version": model.version})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                _write(out, _compute(model, request))
            except Exception as error:  # noqa: BLE001 - the parent says it and ends the run
                traceback.print_exc()
                _write(out, {"error": f"{type(error).__name__}: {error}"})


def _compute(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    prompts, num_tokens = request["prompts"], request["num_tokens"]
    return asdict(model.prefill(prompts[0]) if num_tokens == 1 else model.decode(prompts, num_tokens))


def _write(out: TextIO, content: dict[str, Any]) -> None:
    print(json.dumps(content), file=out, flush=True)
