"""Compiles every kernel of a step at Llama 4 Scout's shapes and prints what came of it; run by test_kernels_compile."""

import sys
from pathlib import Path

import torch

from llama4_dist.config import ModelConfig
from llama4_dist.gpu.model import GpuLlama4
from llama4_dist.gpu.packed import Packed
from llama4_dist.gpu.weights import LayerWeights, ModelWeights
from llama4_dist.model.batch import Batch, SequenceSpan
from llama4_dist.model.kv_cache import KVCache
from tests.gpu.compiling import compile_launches, print_json

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from gpu_checks.stack import scout_config

BLOCK_SIZE = 16
NUM_ROWS = (1, 40, 100)  # decode of one sequence, decode of many, a prompt


def unread_weights(config: ModelConfig, dtype: torch.dtype) -> ModelWeights:
    """Return weights nobody wrote; memory that is not touched costs nothing."""

    def linear(*shape: int) -> Packed:
        return Packed(values_EFD=torch.empty(shape, dtype=dtype))

    width, inner, heads = config.hidden_size, config.expert_width, config.num_heads * config.head_dim
    layer = LayerWeights(
        input_norm_D=torch.empty(width, dtype=dtype),
        qkv=linear(1, heads + 2 * config.num_kv_heads * config.head_dim, width),
        o=linear(1, width, heads),
        post_attention_norm_D=torch.empty(width, dtype=dtype),
        router_ED=torch.empty(config.num_experts, width, dtype=dtype),
        gate_up=linear(config.num_experts + 1, 2 * inner, width),
        down=linear(config.num_experts + 1, width, inner),
    )
    return ModelWeights(
        embedding_VD=torch.empty(config.vocab_size, width, dtype=dtype),
        layers=(layer,) * config.num_layers,
        norm_D=torch.empty(width, dtype=dtype),
        head=linear(1, config.vocab_size, width),
    )


def main() -> None:
    config = scout_config(4)  # three layers with rotation, one without
    kernels = compile_launches()
    model = GpuLlama4(config, unread_weights(config, torch.bfloat16))
    cache = KVCache(config, num_blocks=256, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device="cpu")
    for num_rows in NUM_ROWS:
        lengths = [1] * num_rows if num_rows < NUM_ROWS[-1] else [num_rows - 1, 1]
        spans = tuple(SequenceSpan(num_tokens=n, num_cached=40, blocks=tuple(range(9))) for n in lengths)
        tokens_T = torch.zeros(num_rows, dtype=torch.int64)
        model.forward(Batch(step=1, token_ids_T=tokens_T, spans=spans, logit_rows=tuple(range(num_rows))), cache)
    print_json({kernel.hash: kernel for kernel in kernels}.values())


if __name__ == "__main__":
    main()
