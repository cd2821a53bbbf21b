"""The router: largest logits, lowest index on ties, each score its own logit's sigmoid."""

import torch

from llama4_dist.model.router import Router, scores_of

WEIGHT_ED = torch.eye(4)  # logits are the row itself


def test_ties_go_to_the_lowest_index() -> None:
    x_TD = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -1.0, 2.0, 2.0]])
    route = Router(WEIGHT_ED, 2)(x_TD)
    assert route.experts_TK.tolist() == [[1, 2], [0, 1], [2, 3]]
    assert route.experts_TK.dtype == torch.int64


def test_ties_go_to_the_lowest_index_among_many_experts_in_bfloat16() -> None:
    logits_TE = torch.randint(0, 3, (64, 128), generator=torch.Generator().manual_seed(0)).bfloat16()
    route = Router(torch.eye(128).bfloat16(), 1)(logits_TE)
    assert route.experts_TK[:, 0].tolist() == [row.index(max(row)) for row in logits_TE.tolist()]


def test_scores_are_sigmoids_without_renormalisation() -> None:
    route = Router(WEIGHT_ED, 2)(torch.tensor([[0.0, 2.0, 1.0, -9.0]]))
    torch.testing.assert_close(route.scores_TK, torch.tensor([[0.8807971, 0.7310586]]))


def test_scores_are_computed_in_float32_and_rounded_to_the_model_dtype() -> None:
    logits_TK = torch.tensor([[1.5], [-0.3]], dtype=torch.bfloat16)
    assert torch.equal(scores_of(logits_TK), torch.sigmoid(logits_TK.float()).bfloat16())


def test_a_score_does_not_depend_on_the_other_tokens() -> None:
    logits_TK = torch.randn(500, 1, generator=torch.Generator().manual_seed(1)) * 4
    alone = torch.cat([scores_of(row) for row in logits_TK.split(1)])
    assert torch.equal(alone, scores_of(logits_TK))
