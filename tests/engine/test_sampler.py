import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama4_dist.engine.draw import kept_probabilities, uniform
from llama4_dist.engine.sampler import Sampled, sample
from llama4_dist.errors import EngineError
from tests.engine.sequences import sequence


def random_logits(num_rows: int, vocab_size: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def sampled_ids(logits_PV: Tensor, sequences: list) -> list[int]:
    results = sample(logits_PV, sequences)
    sampled = [result for result in results if isinstance(result, Sampled)]
    assert len(sampled) == len(results)
    return [result.token_id for result in sampled]


def kept(logits_V: Tensor, **sampling: Any) -> list[int]:
    p_PV = kept_probabilities(logits_V[None], [sequence(**({"temperature": 1.0} | sampling))])
    return p_PV[0].nonzero()[:, 0].tolist()


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits_PV = torch.tensor([[1.0, 5.0, 5.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    assert sampled_ids(logits_PV, [sequence(), sequence()]) == [1, 0]


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    logits_PV = torch.tensor([[5.0, 5.0]]).nextafter(torch.tensor([[5.0, 6.0]]))  # one rounding step apart
    for temperature in (9e-6, 1e-45):
        drawn = {sampled_ids(logits_PV, [sequence(temperature=temperature, seed=seed)])[0] for seed in range(30)}
        assert drawn == {1}


def test_top_k_of_one_is_greedy_even_among_equals() -> None:
    logits_PV = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    drawn = {sampled_ids(logits_PV, [sequence(temperature=1.0, top_k=1, seed=seed)])[0] for seed in range(20)}
    assert drawn == {1}


def test_top_p_keeps_a_token_while_the_mass_before_it_is_at_most_p() -> None:
    # Probabilities exact in binary: 1/2, 1/4, 1/8, 1/8. Mass before each: 0, 0.5, 0.75, 0.875.
    logits_V = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert kept(logits_V, top_p=0.49) == [0]
    assert kept(logits_V, top_p=0.51) == [0, 1]
    assert kept(logits_V, top_p=0.76) == [0, 1, 2]
    assert kept(logits_V, top_p=0.88) == [0, 1, 2, 3]
    assert kept(logits_V, top_p=1e-9) == [0]


def test_top_p_measures_the_mass_that_top_k_left() -> None:
    # After top_k=2 the masses are 2/3 and 1/3: 0.6 keeps one token, where the whole distribution would keep two.
    logits_V = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert kept(logits_V, top_k=2, top_p=0.6) == [0]
    assert kept(logits_V, top_k=4, top_p=0.6) == [0, 1]


def test_min_p_is_a_share_of_the_likeliest_token() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert kept(logits_V, min_p=0.29) == [0, 1, 2]
    assert kept(logits_V, min_p=0.31) == [0, 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.7, "min_p": 0.02, "top_k": 9, "top_p": 0.9},
            [TemperatureLogitsWarper(1.7), MinPLogitsWarper(0.02), TopKLogitsWarper(9), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_truncation_gives_the_probabilities_of_transformers(seed: int, sampling: dict, processors: list) -> None:
    logits_PV = random_logits(5, seed=seed)
    # In vLLM's order; transformers would put min_p last. The rules differ only where a mass equals p exactly.
    token_ids: Any = torch.zeros(5, 1, dtype=torch.long)
    expected_PV = LogitsProcessorList(processors)(token_ids, logits_PV.double()).softmax(-1)
    p_PV = kept_probabilities(logits_PV, [sequence(**({"temperature": 1.0} | sampling)) for _ in range(5)])
    torch.testing.assert_close(p_PV / p_PV.sum(dim=1, keepdim=True), expected_PV)


def test_rows_with_different_settings_give_what_each_gives_alone() -> None:
    logits_PV = random_logits(8, vocab_size=400)
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.5, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": {7: 5.0}},
        {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": -0.5},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "allowed_token_ids": tuple(range(50))},
    ]
    for seed in range(10):
        sequences = [sequence(output=(5, 5, 9), seed=seed, **fields) for fields in settings]
        alone = [sampled_ids(logits_PV[row : row + 1], [s])[0] for row, s in enumerate(sequences)]
        assert sampled_ids(logits_PV, sequences) == alone
        assert sampled_ids(logits_PV.flip(0), sequences[::-1]) == alone[::-1]


def test_draws_follow_the_distribution() -> None:
    logits_PV = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    num_draws = 4000
    rows_PV = logits_PV.expand(num_draws, -1)
    ids = sampled_ids(rows_PV, [sequence(temperature=1.0, seed=seed) for seed in range(num_draws)])
    expected = torch.tensor([0.4, 0.3, 0.2, 0.1]) * num_draws
    chi_square = ((torch.bincount(torch.tensor(ids), minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # 3 degrees of freedom: exceeded by chance once in 1000; the seeds are fixed


def test_uniform_numbers_of_neighbouring_keys_are_independent() -> None:
    for vary in (lambda i: (i, 3, 0), lambda i: (3, i, 0), lambda i: (3, 3, i)):
        numbers = torch.tensor([uniform(*vary(i)) for i in range(2000)], dtype=torch.float64)
        counts = torch.histc(numbers, bins=20, min=0.0, max=1.0)
        assert ((counts - 100) ** 2 / 100).sum() < 43.82  # chi-square, 19 degrees of freedom, 1 in 1000
        assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 0.08
        assert 0.0 <= numbers.min() <= numbers.max() < 1.0


def test_a_draw_depends_on_seed_position_and_sequence_index() -> None:
    assert len({uniform(1, 2, 3), uniform(2, 2, 3), uniform(1, 3, 3), uniform(1, 2, 4)}) == 4
    assert uniform(2**64 - 1, 10_485_760, 7) == 0.35792844029643056  # pinned: replays outlive releases
    flat_PV = torch.zeros(10, 1000)
    assert len(set(sampled_ids(flat_PV, [sequence(output=(1,) * i, temperature=1.0, seed=4) for i in range(10)]))) > 5
    assert uniform(2**64 - 1, 0, 0) != uniform(2**64 - 2, 0, 0)  # all 64 bits of a seed count


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits_PV = random_logits(3)
    prompt, output = (4, 9, 4), (11, 30)
    expected_PV = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([[*prompt, *output]] * 3), logits_PV.clone())
    sequences = [sequence(prompt=prompt, output=output, repetition_penalty=1.8) for _ in range(3)]
    assert sampled_ids(logits_PV, sequences) == expected_PV.argmax(-1).tolist()
    bias = {4: 20.0}
    scores_V = expected_PV[0].clone()
    scores_V[4] = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([[4]]), logits_PV[:1] + 20.0)[0, 4]
    biased = sequence(prompt=prompt, output=output, repetition_penalty=1.8, logit_bias=bias)
    assert sampled_ids(logits_PV[:1], [biased]) == [int(scores_V.argmax())]  # bias first, then penalties


def test_frequency_counts_the_output_and_presence_counts_once() -> None:
    logits_PV = torch.tensor([[10.0, 9.0, 8.5, 0.0]])
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 0),
        ({"frequency_penalty": 0.4}, 1),  # 10 - 3 * 0.4 = 8.8 < 9
        ({"frequency_penalty": 0.3}, 0),  # 10 - 0.9 = 9.1
        ({"presence_penalty": 1.1}, 1),  # 10 - 1.1 = 8.9: once, however often it occurred
        ({"presence_penalty": 0.9}, 0),
    ]
    for fields, winner in cases:
        assert sampled_ids(logits_PV, [sequence(prompt=(1, 2), output=(0, 0, 0), **fields)]) == [winner]
    prompt_only = sequence(prompt=(0, 0, 0), output=(), frequency_penalty=5.0, presence_penalty=5.0)
    assert sampled_ids(logits_PV, [prompt_only]) == [0]


def test_masks_and_bias_choose_among_what_is_left() -> None:
    logits_PV = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert sampled_ids(logits_PV, [sequence(bad_token_ids=(0,))]) == [1]
    assert sampled_ids(logits_PV, [sequence(allowed_token_ids=(2, 3))]) == [2]
    assert sampled_ids(logits_PV, [sequence(allowed_token_ids=(2, 3), bad_token_ids=(2,))]) == [3]
    assert sampled_ids(logits_PV, [sequence(logit_bias={3: 3.5, 0: -100.0})]) == [3]
    end = frozenset({0, 1})
    assert sampled_ids(logits_PV, [sequence(output=(5,), min_tokens=2, end_token_ids=end)]) == [2]
    assert sampled_ids(logits_PV, [sequence(output=(5, 5), min_tokens=2, end_token_ids=end)]) == [0]


def test_the_caller_keeps_its_logits() -> None:
    logits_PV = random_logits(2)
    before_PV = logits_PV.clone()
    sample(logits_PV, [sequence(logit_bias={1: 9.0}), sequence(temperature=1.0, repetition_penalty=2.0)])
    assert torch.equal(logits_PV, before_PV)


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits_PV = random_logits(1)
    logprobs_V = logits_PV[0].log_softmax(0)
    fields: dict[str, Any] = {"temperature": 0.3, "top_k": 3, "logit_bias": {2: 50.0}, "logprobs": 4}
    (result,) = sample(logits_PV, [sequence(**fields)])
    assert isinstance(result, Sampled)
    assert result.logprobs is not None
    token = result.logprobs.token
    assert token.token_id == result.token_id == 2
    assert token.logprob == pytest.approx(logprobs_V[2].item())
    order = logprobs_V.argsort(descending=True).tolist()
    assert token.rank == order.index(2) + 1
    assert [entry.token_id for entry in result.logprobs.top] == order[:4]
    assert [entry.rank for entry in result.logprobs.top] == [1, 2, 3, 4]


def test_equal_logprobs_are_listed_by_token_id() -> None:
    logits_PV = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]])
    (result,) = sample(logits_PV, [sequence(logprobs=2)])
    assert isinstance(result, Sampled)
    assert result.logprobs is not None
    assert [(entry.token_id, entry.rank) for entry in result.logprobs.top] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_their_own_request_only(bad: float, temperature: float) -> None:
    logits_PV = random_logits(3)
    sequences = [sequence(temperature=temperature, top_p=0.9, seed=row) for row in range(3)]
    before = sampled_ids(logits_PV, sequences)
    logits_PV[1, 4] = bad
    first, second, third = sample(logits_PV, sequences)
    assert isinstance(second, EngineError)
    assert "not finite" in str(second)
    assert [first, third] == [Sampled(token_id=before[0]), Sampled(token_id=before[2])]


def test_a_request_that_breaks_the_sampler_fails_alone() -> None:
    logits_PV = random_logits(3)
    broken = sequence(bad_token_ids=(10**6,))
    results = sample(logits_PV, [sequence(), broken, sequence(temperature=1.0)])
    assert [type(result) for result in results] == [Sampled, EngineError, Sampled]


def test_a_request_whose_masks_leave_nothing_fails_alone() -> None:
    logits_PV = random_logits(2)
    results = sample(logits_PV, [sequence(allowed_token_ids=(3,), bad_token_ids=(3,)), sequence()])
    assert isinstance(results[0], EngineError)
    assert "leave no token" in str(results[0])
    assert isinstance(results[1], Sampled)
