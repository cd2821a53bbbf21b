"""Every sampling field is refused outside its range, with its name, and all violations are told at once."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.errors import InvalidRequestError
from llama4_dist.request import EngineLimits, Sampling
from llama4_dist.validation import check_sampling, is_greedy

LIMITS = EngineLimits(model="tiny", vocab_size=320, max_context=100, max_waiting=4, max_n=8, max_logprobs=20)


def refused_fields(**fields: Any) -> list[str]:
    try:
        check_sampling(Sampling(**fields), LIMITS)
    except InvalidRequestError as error:
        return [violation.field for violation in error.violations]
    return []


# (smallest allowed, largest allowed, below, above)
NUMBERS: dict[str, tuple[float, float, float, float]] = {
    "n": (1, 8, 0, 9),
    "temperature": (0.0, 2.0, -1e-9, 2.0001),
    "top_p": (1e-9, 1.0, 0.0, 1.0001),
    "top_k": (-1, 2**31 - 1, -2, 2**31),
    "min_p": (0.0, 1.0, -0.1, 1.1),
    "presence_penalty": (-2.0, 2.0, -2.1, 2.1),
    "frequency_penalty": (-2.0, 2.0, -2.1, 2.1),
    "repetition_penalty": (0.01, 10.0, 0.0, 10.1),
    "seed": (0, 2**64 - 1, -1, 2**64),
    "max_tokens": (1, 100, 0, 101),
    "min_tokens": (0, 100, -1, 101),
    "logprobs": (0, 20, -1, 21),
    "prompt_logprobs": (0, 20, -1, 21),
}
WHOLE = {"n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"}
OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


def test_the_table_names_every_number_of_sampling() -> None:
    numbers = {f.name for f in dataclasses.fields(Sampling) if f.type in (int, float, int | None)}
    assert numbers == set(NUMBERS)


def test_the_defaults_are_allowed() -> None:
    check_sampling(Sampling(), LIMITS)


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_is_allowed_up_to_its_ends_and_refused_beyond(field: str) -> None:
    low, high, below, above = NUMBERS[field]
    assert [refused_fields(**{field: value}) for value in (low, high)] == [[], []]
    wrong: list[Any] = [below, above, math.nan, math.inf, -math.inf, 1e38, 10**400, True, False, "1", [1], 2**63]
    if field in WHOLE:
        wrong.append(1.0)
    if field == "seed":
        wrong.remove(2**63)
    for value in wrong:
        assert refused_fields(**{field: value}) == [field], value
    assert refused_fields(**{field: None}) == ([] if field in OPTIONAL else [field])


@given(value=st.one_of(st.floats(), st.integers()), field=st.sampled_from(sorted(NUMBERS)))
def test_any_number_is_judged_by_its_interval_alone(field: str, value: float) -> None:
    low, high, below, _ = NUMBERS[field]
    if field in WHOLE:
        allowed = isinstance(value, int) and low <= value <= high
    else:
        allowed = (below < value if field in ("top_p", "repetition_penalty") else low <= value) and value <= high
    assert (refused_fields(**{field: value}) == []) is allowed


@pytest.mark.parametrize("temperature", [0, 0.0, 5e-324, 1e-45, 9e-6])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    assert refused_fields(temperature=temperature) == []
    assert is_greedy(Sampling(temperature=temperature))


def test_an_ordinary_temperature_is_not_greedy() -> None:
    assert not is_greedy(Sampling(temperature=1e-5))


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"stop": ("a",) * 17}, "stop"),
        ({"stop": "abc"}, "stop"),
        ({"stop": None}, "stop"),
        ({"stop": ("",)}, "stop[0]"),
        ({"stop": ("ok", "é" * 129)}, "stop[1]"),
        ({"stop": (b"x",)}, "stop[0]"),
        ({"stop": ("\ud800",)}, "stop[0]"),
        ({"stop_token_ids": (320,)}, "stop_token_ids[0]"),
        ({"stop_token_ids": (1, -1)}, "stop_token_ids[1]"),
        ({"stop_token_ids": (True,)}, "stop_token_ids[0]"),
        ({"stop_token_ids": (1,) * 1025}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"bad_token_ids": (2**31,)}, "bad_token_ids[0]"),
        ({"bad_token_ids": None}, "bad_token_ids"),
        ({"allowed_token_ids": (320,)}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"allowed_token_ids": ([],)}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": (1,) * 321}, "allowed_token_ids"),
        ({"allowed_token_ids": (1, 2), "bad_token_ids": (2, 1)}, "allowed_token_ids"),
        ({"logit_bias": {320: 1.0}}, "logit_bias[0]"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias[0]"),
        ({"logit_bias": {1: math.nan}}, "logit_bias[1]"),
        ({"logit_bias": {1: 100.5}}, "logit_bias[1]"),
        ({"logit_bias": {1: -math.inf}}, "logit_bias[1]"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias[0]"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"skip_special_tokens": None}, "skip_special_tokens"),
        ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output"),
    ],
)
def test_a_field_that_is_no_number_is_refused_by_name(fields: dict[str, Any], refused: str) -> None:
    assert refused_fields(**fields) == [refused]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ("a" * 256, "é" * 128)},
        {"stop": ("x",) * 16},
        {"stop_token_ids": (0, 319)},
        {"logit_bias": {0: -100.0, 319: 100}},
        {"allowed_token_ids": tuple(range(320))},
        {"min_tokens": 5, "max_tokens": 5},
    ],
)
def test_values_at_the_limits_are_allowed(fields: dict[str, Any]) -> None:
    assert refused_fields(**fields) == []


def test_all_violations_are_told_at_once() -> None:
    assert refused_fields(n=0, temperature=-1, top_p=2, stop=("",), logit_bias={1: 1e9}, seed=-1) == [
        "n", "temperature", "top_p", "seed", "stop[0]", "logit_bias[1]",
    ]  # fmt: skip


def test_a_message_names_value_and_range_and_stays_short() -> None:
    with pytest.raises(InvalidRequestError, match=r"temperature: must be a number from 0\.0 to 2\.0, not 3\.5"):
        check_sampling(Sampling(temperature=3.5), LIMITS)
    with pytest.raises(InvalidRequestError) as caught:
        check_sampling(Sampling(temperature="x" * 10_000_000, seed=10**100_000, stop="\U0010ffff" * 80), LIMITS)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400


def test_input_is_checked_without_asserts_too() -> None:
    code = (
        "from tests.validation.test_sampling import refused_fields, LIMITS, Sampling, InvalidRequestError\n"
        "from llama4_dist.validation import check_prompt\n"
        "bad = refused_fields(n=0, temperature=float('nan'), logit_bias={1: float('inf')}, stop=('',))\n"
        "print(bad, __debug__)\n"
        "try: check_prompt([320], Sampling(), LIMITS)\n"
        "except InvalidRequestError as error: print(error.violations[0].field)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split("\n")[:2] == ["['n', 'temperature', 'stop[0]', 'logit_bias[1]'] False", "prompt[0]"]
