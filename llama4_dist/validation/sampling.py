"""Checks the sampling fields of a request against the engine's limits."""

from collections.abc import Iterator, Mapping

from llama4_dist.errors import FieldViolation
from llama4_dist.request import EngineLimits, Sampling
from llama4_dist.validation.violations import Range, outside_vocabulary, raise_any, shown, text_problem, violation

# Logits divided by less than this overflow float32, so such a request is greedy (vLLM draws the same line).
GREEDY_TEMPERATURE = 1e-5
MAX_SEED = 2**64 - 1


def check_sampling(sampling: Sampling, limits: EngineLimits) -> None:
    """Raise InvalidRequestError naming every field of `sampling` that `limits` does not allow."""
    raise_any(
        [
            *_numbers(sampling, limits),
            *_flags(sampling),
            *_stop_strings(sampling, limits),
            *_id_lists(sampling, limits),
            *_logit_bias(sampling, limits),
        ]
    )
    raise_any(list(_contradictions(sampling)))  # has a meaning only among values that are each valid


def is_greedy(sampling: Sampling) -> bool:
    """Tell whether the likeliest token is taken: temperature 0, or too small to divide by."""
    return sampling.temperature < GREEDY_TEMPERATURE


def _numbers(sampling: Sampling, limits: EngineLimits) -> Iterator[FieldViolation]:
    ranges = {
        "n": Range(kind=int, low=1, high=limits.max_n),
        "temperature": Range(kind=float, low=0.0, high=2.0),
        "top_p": Range(kind=float, low=0.0, high=1.0, exclusive=True),
        # Above the vocabulary it keeps everything, like 0 and -1.
        "top_k": Range(kind=int, low=-1, high=2**31 - 1),
        "min_p": Range(kind=float, low=0.0, high=1.0),
        "presence_penalty": Range(kind=float, low=-2.0, high=2.0),
        "frequency_penalty": Range(kind=float, low=-2.0, high=2.0),
        "repetition_penalty": Range(kind=float, low=0.0, high=10.0, exclusive=True),
        "seed": Range(kind=int, low=0, high=MAX_SEED, optional=True),
        "max_tokens": Range(kind=int, low=1, high=limits.max_context, optional=True),
        "min_tokens": Range(kind=int, low=0, high=limits.max_context),
        "logprobs": Range(kind=int, low=0, high=limits.max_logprobs, optional=True),
        "prompt_logprobs": Range(kind=int, low=0, high=limits.max_logprobs, optional=True),
    }
    for field, allowed in ranges.items():
        problem = allowed.problem(getattr(sampling, field))
        if problem:
            yield violation(field, problem)


def _flags(sampling: Sampling) -> Iterator[FieldViolation]:
    for field in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
        value = getattr(sampling, field)
        if not isinstance(value, bool):
            yield violation(field, f"must be true or false, not {shown(value)}")


def _stop_strings(sampling: Sampling, limits: EngineLimits) -> Iterator[FieldViolation]:
    if not isinstance(sampling.stop, tuple | list):
        yield violation("stop", f"must be a sequence of strings, not {shown(sampling.stop)}")
        return
    if len(sampling.stop) > limits.max_stop_strings:
        count = len(sampling.stop)
        yield violation("stop", f"has {count} strings; at most {limits.max_stop_strings} are allowed")
        return
    for index, text in enumerate(sampling.stop):
        problem = text_problem(text, limits.max_stop_bytes)
        if problem is None and not text:
            problem = "is empty, which would stop every answer at once; leave it out"
        if problem:
            yield violation(f"stop[{index}]", problem)


def _id_lists(sampling: Sampling, limits: EngineLimits) -> Iterator[FieldViolation]:
    max_counts = {
        "stop_token_ids": limits.max_logit_bias,
        "bad_token_ids": limits.max_logit_bias,
        "allowed_token_ids": limits.vocab_size,
    }
    for field, max_count in max_counts.items():
        token_ids = getattr(sampling, field)
        if field == "allowed_token_ids" and token_ids is None:
            continue
        if not isinstance(token_ids, tuple | list):
            yield violation(field, f"must be a sequence of token ids, not {shown(token_ids)}")
        elif len(token_ids) > max_count:
            yield violation(field, f"has {len(token_ids)} ids; at most {max_count} are allowed")
        else:
            yield from outside_vocabulary(field, token_ids, limits.vocab_size)


def _logit_bias(sampling: Sampling, limits: EngineLimits) -> Iterator[FieldViolation]:
    bias = sampling.logit_bias
    if not isinstance(bias, Mapping):
        yield violation("logit_bias", f"must map token ids to numbers, not {shown(bias)}")
        return
    if len(bias) > limits.max_logit_bias:
        yield violation("logit_bias", f"has {len(bias)} entries; at most {limits.max_logit_bias} are allowed")
        return
    yield from outside_vocabulary("logit_bias", tuple(bias), limits.vocab_size)
    allowed = Range(kind=float, low=-100.0, high=100.0)
    for token_id, value in bias.items():
        problem = allowed.problem(value)
        if problem:
            yield violation(f"logit_bias[{shown(token_id)}]", problem)


def _contradictions(sampling: Sampling) -> Iterator[FieldViolation]:
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        yield violation("min_tokens", f"is {sampling.min_tokens}, above max_tokens {sampling.max_tokens}; lower it")
    if sampling.allowed_token_ids is not None and set(sampling.allowed_token_ids) <= set(sampling.bad_token_ids):
        yield violation("allowed_token_ids", "leaves no token that may be drawn; allow at least one")
