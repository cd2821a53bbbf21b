"""The attention half of a decoder layer as one native pass."""

from ctypes import byref

from torch import Tensor

from llama4_dist.config import ModelConfig
from llama4_dist.model.cpu.linears import read_linear
from llama4_dist.model.cpu.panels import NAME_OF, WEIGHT_NAME_OF
from llama4_dist.model.cpu.plan import CpuPlan
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.weights import Weights
from llama4_dist.native import threads
from llama4_dist.native.bindings import AttentionLayer, Cache, passes


class Attention:
    """to += attention(norm(x)). The same as `model.attention.Attention` with the layer's norm and residual."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        prefix = f"model.layers.{layer}"
        has_rope = config.rope_layers[layer]
        self._layer = layer
        self._heads = (config.num_kv_heads, config.head_dim)
        self._norm_D = weights.tensor(f"{prefix}.input_layernorm.weight").float()
        self._qkv = read_linear(weights, *[f"{prefix}.self_attn.{name}_proj.weight" for name in "qkv"])
        self._o = read_linear(weights, f"{prefix}.self_attn.o_proj.weight")
        self._struct = AttentionLayer(
            *(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            *(has_rope, config.use_qk_norm and has_rope, config.temperature_tuning and not has_rope),
            *(config.rms_norm_eps, self._norm_D.data_ptr(), self._qkv.address, self._o.address),
        )
        name = WEIGHT_NAME_OF[self._qkv.strips.dtype]
        self._runs = {dtype: getattr(passes(), f"l4d_attention_{name}_{NAME_OF[dtype]}") for dtype in NAME_OF}

    def __call__(self, x_TD: Tensor, plan: CpuPlan, cache: KVCache, to_TD: Tensor) -> None:
        """Add the output for the residual stream, float32 [T, D], to `to_TD`, which may be the stream itself."""
        keys, values = cache.addresses(self._layer)
        step = plan.groups[cache.layout.group_of[self._layer]]
        where = Cache(keys, values, *self._heads)
        run = self._runs[cache.dtype]
        run(byref(self._struct), byref(step), byref(where), x_TD.data_ptr(), to_TD.data_ptr(), threads.count())
