"""Dispatch and combine over links inside the process."""

import pytest
import torch

from tests.dispatch.fakes import InprocCluster, direct, random_batch, random_table


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64])
def test_combine_undoes_dispatch(num_tokens: int, num_slots: int, num_hosts: int) -> None:
    dispatcher = InprocCluster(random_table(num_hosts, seed=num_tokens)).dispatcher()
    x_TD, experts_TK, scores_TK = random_batch(num_tokens, num_slots)
    for layer in range(3):
        y_TD = dispatcher.combine(dispatcher.dispatch(layer, x_TD, experts_TK, scores_TK))
        assert torch.equal(y_TD, direct(layer, x_TD, experts_TK, scores_TK))
