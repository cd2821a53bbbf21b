"""The one validator of requests for every face (Python, gRPC, CLI); knows limits, no transport and no tokenizer.

Each check collects all violations before it raises, and names the field as `Sampling` or `Message` does. Input is
never checked by `assert`, so `python -O` changes nothing.
"""

from llama4_dist.validation.prompt import (
    ROLES,
    check_messages,
    check_prompt,
    check_request_id,
    check_text,
    check_token_ids,
)
from llama4_dist.validation.sampling import GREEDY_TEMPERATURE, check_sampling, is_greedy

__all__ = [
    "GREEDY_TEMPERATURE",
    "ROLES",
    "check_messages",
    "check_prompt",
    "check_request_id",
    "check_sampling",
    "check_text",
    "check_token_ids",
    "is_greedy",
]
