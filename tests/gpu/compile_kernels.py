"""Compiles every kernel of a step at Llama 4 Scout's shapes and prints what came of it; run by test_kernels_compile."""

import sys
from pathlib import Path

import torch

from llama4_dist.config import ModelConfig
from llama4_dist.gpu.experts import DeviceExpert, GpuExperts
from llama4_dist.gpu.model import GpuLlama4
from llama4_dist.gpu.packed import Packed
from llama4_dist.gpu.row_kernels import add_and_norm, add_norm_and_route
from llama4_dist.gpu.weights import LayerWeights, ModelWeights
from tests.gpu.compiling import compile_launches, print_json

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from gpu_checks.stack import make_batch, make_cache, scout_config

ROW_WIDTHS = (64, 128, 640, 5120)  # a row that is updated in place must have a thread for each element
NUM_GROUPS = (1, 2, 4)  # of an expert host's launch: each has tiles of its own
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


def ask_a_host(config: ModelConfig) -> None:
    """Launch what an expert host launches."""
    width, inner, dtype = config.hidden_size, config.expert_width, torch.bfloat16
    experts = GpuExperts(width=width, expert_width=inner, num_experts=max(NUM_GROUPS), dtype=dtype, device="cpu")
    expert = DeviceExpert(
        gate_up=torch.empty((2 * inner, width), dtype=dtype), down=torch.empty((width, inner), dtype=dtype)
    )
    experts._held = {(0, number): expert for number in range(max(NUM_GROUPS))}
    for num_groups in NUM_GROUPS:
        for num_rows in NUM_ROWS:
            x_RD = torch.empty((num_groups * num_rows, width), dtype=dtype)
            experts(0, [(number, num_rows) for number in range(num_groups)], x_RD, torch.empty_like(x_RD))


def main() -> None:
    config = scout_config(4)  # three layers with rotation, one without
    kernels = compile_launches()
    model = GpuLlama4(config, unread_weights(config, torch.bfloat16))
    cache = make_cache(config, 4096, torch.device("cpu"), torch.bfloat16)
    for num_rows in NUM_ROWS:
        lengths = [1] * num_rows if num_rows < NUM_ROWS[-1] else [num_rows - 1, 1]
        parts = [([0] * length, 40, range(9)) for length in lengths]
        model.forward(make_batch(model, parts), cache)
    ask_a_host(config)
    for width in ROW_WIDTHS:
        x_TD, normed_TD = torch.empty(2, width), torch.empty(2, width)
        add_and_norm(x_TD, normed_TD, torch.empty(width), normed_TD, eps=1e-5)
        add_norm_and_route(
            x_TD,
            normed_TD,
            torch.empty(width),
            normed_TD,
            torch.empty(16, width),
            torch.zeros(2, dtype=torch.int32),
            eps=1e-5,
            experts_per_token=1,
            experts_N=torch.zeros(4, dtype=torch.int32),
            copies_ND=torch.empty(4, width),
        )
    print_json({kernel.hash: kernel for kernel in kernels}.values())


if __name__ == "__main__":
    main()
