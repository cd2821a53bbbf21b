"""Builds sequence states and requests for the engine's tests."""

from collections import Counter
from typing import Any

from llama4_dist.engine.sequence import SequenceState
from llama4_dist.request import EngineRequest, Sampling


def request(request_id: str = "r", prompt: tuple[int, ...] = (1, 2, 3), **fields: Any) -> EngineRequest:
    """A request; sampling fields and EngineRequest fields by name. Greedy unless a temperature is given."""
    own = {name: fields.pop(name) for name in list(fields) if name in EngineRequest.__slots__}
    sampling = Sampling(**({"temperature": 0.0, "seed": 0} | fields))
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **own)


def sequence(
    request_id: str = "r",
    prompt: tuple[int, ...] = (1, 2, 3),
    output: tuple[int, ...] = (),
    arrival: int = 0,
    end_token_ids: frozenset[int] = frozenset(),
    **fields: Any,
) -> SequenceState:
    """A sequence that has produced `output` so far."""
    made = request(request_id, prompt, **fields)
    return SequenceState(
        request=made,
        seed=made.sampling.seed or 0,
        max_tokens=100,
        end_token_ids=end_token_ids,
        order=(made.priority, arrival),
        arrived_s=0.0,
        deadline_s=None,
        tokens=[*prompt, *output],
        output_counts=Counter(output),
    )
