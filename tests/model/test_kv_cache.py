"""What is read from the cache is what was written, rounded to the dtype of the cache and to nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.checkpoint.config_file import read_config
from llama4_dist.config import ModelConfig
from llama4_dist.model.kv_cache import KVCache
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("scout"), "scout")
    return read_config(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_entries_come_back_as_stored(config: ModelConfig, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    cache = KVCache(config, num_pages=4, block_size=4, dtype=dtype, device="cpu", compute_dtype=compute_dtype)
    k_TGC, v_TGC = (torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(i)).to(compute_dtype) for i in (0, 1))
    k_TGC[0, 0, 0] = 1e4  # more than a float8 holds
    slots_T = torch.tensor([7, 0, 11, 3, 4])
    cache.write(2, slots_T, k_TGC, v_TGC)
    largest = torch.finfo(dtype).max
    for read, written in zip(cache.read(2, slots_T[None]), (k_TGC, v_TGC), strict=True):
        assert read.dtype == compute_dtype
        expected = written.double().clamp(-largest, largest).to(dtype).to(compute_dtype)
        assert torch.equal(read[0].transpose(0, 1), expected)
    keys, _ = cache.slots(2)
    assert keys.dtype == dtype
    assert torch.equal(keys.float()[7], k_TGC[0].flatten().double().clamp(-largest, largest).to(dtype).float())
    assert cache.num_bytes == 2 * 1 * 4 * 4 * 2 * 16 * dtype.itemsize


def test_the_fingerprint_covers_what_an_entry_depends_on_besides_its_tokens(config: ModelConfig) -> None:
    def fingerprint(**changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "num_pages": 2,
            "block_size": 4,
            "dtype": torch.float32,
            "device": "cpu",
            "model_hash": "a",
        }
        return KVCache(config, **fields | changes).fingerprint

    assert fingerprint() == fingerprint(num_pages=3), "how many pages there are changes no entry"
    changes: list[dict[str, Any]] = [{"model_hash": "b"}, {"block_size": 8}]
    changes += [{"dtype": torch.bfloat16}, {"compute_dtype": torch.bfloat16}]
    assert len({fingerprint(), *(fingerprint(**change) for change in changes)}) == 5


def test_layers_of_different_groups_share_memory_and_those_of_one_group_do_not(config: ModelConfig) -> None:
    cache = KVCache(config, num_pages=2, block_size=4, dtype=torch.float32, device="cpu")
    cache.write(0, torch.tensor([1]), torch.ones(1, 2, 16), torch.ones(1, 2, 16))
    assert cache.layout.group_of[0] != cache.layout.group_of[3]
    assert torch.equal(cache.slots(3)[0][1], torch.ones(32)), "one pool: the engine sees to it that pages differ"
