"""The counts of bytes and operations against slow ones over the tensors of a real checkpoint."""

from pathlib import Path

import pytest

from benchmarks.active import decode_bytes, kv_bytes, prefill_operations
from llama4_dist.checkpoint.reader import Checkpoint
from tests.checkpoints import make_checkpoint

PRESETS = ["scout", "maverick", "topk2", "dense", "v5"]
NUM_TOKENS = 37  # more than two chunks of 16


@pytest.fixture(params=PRESETS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path, request.param))


def elements_met(checkpoint: Checkpoint) -> dict[str, int]:
    """The elements of each tensor that one token meets: of experts, those of the K it is sent to."""
    config = checkpoint.config
    met = {}
    for name, entry in checkpoint.entries.items():
        share = config.experts_per_token if ".experts." in name else config.num_experts or 1
        met[name] = entry.num_elements * share // (config.num_experts or 1)
    return met


def test_a_decode_step_reads_every_tensor_its_token_meets(checkpoint: Checkpoint) -> None:
    met = elements_met(checkpoint)
    embedding = met.pop("model.embed_tokens.weight")
    # A tied head reads the embedding table, all of it.
    head = embedding if checkpoint.config.tie_word_embeddings else 0
    assert decode_bytes(checkpoint.config) == 4 * (sum(met.values()) + head)


def test_a_prefill_multiplies_each_token_with_each_matrix_it_meets(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    met = elements_met(checkpoint)
    table = met.pop("model.embed_tokens.weight")
    operations = 2 * met.pop("lm_head.weight", table)  # the head is for the last token only
    for _ in range(NUM_TOKENS):
        operations += 2 * sum(elements for name, elements in met.items() if "norm" not in name)
    for layer in range(config.num_layers):
        for query in range(NUM_TOKENS):
            for key in range(query + 1):
                chunk_size = config.chunk_size if config.chunked_layers[layer] else NUM_TOKENS
                assert chunk_size is not None
                if key // chunk_size != query // chunk_size:
                    continue
                # q · k, and the key's share of v: a product and a sum for each of the C elements of each head.
                operations += 2 * 2 * config.num_heads * config.head_dim
    assert prefill_operations(config, NUM_TOKENS) == operations


def test_keys_and_values_of_a_chunked_layer_are_those_of_the_chunk(tmp_path: Path) -> None:
    config = Checkpoint.open(make_checkpoint(tmp_path, "scout")).config
    # Four layers of which the last is not chunked; 2 heads x 16 elements x 4 bytes for a key, as much for a value.
    assert kv_bytes(config, 20) == 2 * 2 * 16 * 4 * (3 * 5 + 21)
