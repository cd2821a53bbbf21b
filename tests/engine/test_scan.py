"""The native reading of logits finds what torch finds, at every length and with ties."""

import pytest
import torch

from llama4_dist.engine import scan as module
from llama4_dist.engine.scan import scan


@pytest.mark.parametrize("num_columns", [1, 15, 16, 17, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("kind", ["native", "torch"])
def test_the_first_of_the_largest_is_found(num_columns: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "torch":
        monkeypatch.setattr(module, "passes", lambda: None)
    generator = torch.Generator().manual_seed(num_columns)
    logits_PV = torch.randint(-50, 50, (7, num_columns), generator=generator).float()  # with ties
    logits_PV[1] = -3.5
    logits_PV[2, num_columns // 2] = float("nan")
    logits_PV[3, -1] = float("inf")
    logits_PV[4, 0] = -float("inf")
    best, finite = scan(logits_PV)
    assert finite == [True, True, False, False, False, True, True]
    whole = [0, 1, 5, 6]
    assert [best[row] for row in whole] == logits_PV[whole].argmax(dim=1).tolist()
    assert best[1] == 0
    assert all(0 <= token < num_columns for token in best)


def test_rows_apart_in_memory_are_read_where_they_lie() -> None:
    wide_PV = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    assert scan(wide_PV[::2, 10:200])[0] == wide_PV[::2, 10:200].argmax(dim=1).tolist()
