"""Turns a request into a sequence: resolves its bounds and end tokens, or refuses what can never fit."""

import secrets
from collections import Counter

from llama4_dist.engine.sequence import SequenceState
from llama4_dist.errors import OverloadedError
from llama4_dist.request import EngineLimits, EngineRequest


def check_fits(request: EngineRequest, limits: EngineLimits) -> None:
    """Raise OverloadedError (KV_CACHE_EXHAUSTED) for a request that not even an empty cache could run."""
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    if num_tokens >= limits.max_context:
        raise OverloadedError(
            f"{num_tokens} tokens leave no room in the context of {limits.max_context}: shorten the prompt",
            reason="KV_CACHE_EXHAUSTED",
        )
    if not request.prompt_token_ids:
        raise ValueError(f"request {request.request_id} has no prompt token")


def make_sequence(
    request: EngineRequest, *, limits: EngineLimits, eos_token_ids: frozenset[int], arrival: int, now_s: float
) -> SequenceState:
    """Return the sequence of a request that arrived as number `arrival`.

    `max_tokens` is cut to what the context holds; tokens of a replay count as output from the start.
    """
    sampling = request.sampling
    room = limits.max_context - len(request.prompt_token_ids)
    return SequenceState(
        request=request,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
        end_token_ids=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_token_ids),
        order=(request.priority, arrival),
        arrived_s=now_s,
        deadline_s=None if request.timeout_s is None else now_s + request.timeout_s,
        tokens=[*request.prompt_token_ids, *request.output_token_ids],
        output_counts=Counter(request.output_token_ids),
    )
