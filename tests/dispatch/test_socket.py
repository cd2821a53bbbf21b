"""Dispatch and combine over real sockets."""

from pathlib import Path

import pytest
import torch

from tests.dispatch.fakes import direct, random_batch, random_table
from tests.dispatch.servers import dispatcher, serve


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_hosts", [1, 4, 16])
def test_combine_undoes_dispatch(num_hosts: int, dtype: torch.dtype, transport: str, tmp_path: Path) -> None:
    table = random_table(num_hosts)
    with serve(table, tmp_path, transport=transport, dtype=dtype) as servers:
        worker = dispatcher(table, servers)
        for num_tokens in (0, 1, 7, 64, 300):
            for num_slots in (1, 2):
                x_TD, experts_TK, scores_TK = random_batch(num_tokens, num_slots, dtype=dtype)
                y_TD = worker.combine(worker.dispatch(1, x_TD, experts_TK, scores_TK))
                assert torch.equal(y_TD, direct(1, x_TD, experts_TK, scores_TK))
        worker.close()
