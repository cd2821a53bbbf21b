"""What tests of several steps in flight share: requests, faults, and an engine core to begin with."""

from collections.abc import Callable
from typing import Any

from llama4_dist.engine.engine import EngineCore
from llama4_dist.errors import UnavailableError
from llama4_dist.model.batch import Batch
from tests.engine.sequences import request
from tests.stages.turns import Stages

GONE = UnavailableError("expert 3 of layer 1 has no live host", reason="EXPERT_UNREACHABLE")


def in_turns(num_stages: int) -> Stages:
    stages = Stages(num_stages)
    stages.wait = stages.turn
    return stages


def prompts(number: int, length: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"r{i}": tuple((5 * i + j) % 90 for j in range(length)) for i in range(number)}


def raising(error: Exception, token: int) -> Callable[[Batch], None]:
    """Fail a part that holds a token."""

    def check(batch: Batch) -> None:
        if (batch.token_ids_T == token).any():
            raise error

    return check


def start(core: EngineCore, wanted: dict[str, tuple[int, ...]], **fields: Any) -> None:
    for name, prompt in wanted.items():
        core.add(request(name, prompt, **{"max_tokens": 12} | fields))


def all_free(core: EngineCore) -> bool:
    return core.scheduler.allocator.num_free == core.scheduler.allocator.num_pages


def refuse(batch: Batch) -> None:
    raise GONE
