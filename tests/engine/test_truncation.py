import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from llama4_dist.engine.truncation import truncate
from llama4_dist.request import Sampling


def slow_truncate(p: list[float], sampling: Sampling) -> list[float]:
    """The rule in plain words, one token at a time."""
    order = sorted(range(len(p)), key=lambda token_id: (-p[token_id], token_id))
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    mass, before, kept = sum(p[token_id] for token_id in order), 0.0, [0.0] * len(p)
    for token_id in order:
        if sampling.top_p < 1.0 and before > sampling.top_p * mass:
            break
        kept[token_id] = p[token_id]
        before += p[token_id]
    return kept


# Multiples of 1/64 are exact in binary, so that equal masses are equal in every order of summation; many are ties.
rows = st.lists(st.integers(0, 6).map(lambda i: i / 64), min_size=12, max_size=12).filter(any)
samplings = st.builds(
    Sampling, top_k=st.integers(-1, 14), top_p=st.sampled_from([0.0625, 0.25, 0.5, 0.75, 0.9375, 1.0])
)


@pytest.mark.parametrize("num_candidates", [1, 3, 8, 12, 100])
@given(batch=st.lists(st.tuples(rows, samplings), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_few_candidates_give_what_sorting_everything_gives(
    num_candidates: int, batch: list[tuple[list[float], Sampling]]
) -> None:
    p_PV = torch.tensor([p for p, _ in batch], dtype=torch.float64)
    kept_PV = truncate(p_PV, [sampling for _, sampling in batch], num_candidates=num_candidates)
    assert kept_PV.tolist() == [slow_truncate(p, sampling) for p, sampling in batch]
