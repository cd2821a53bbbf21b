"""Self-attention of one layer over cached keys and values, for prefill and decode tokens of one step alike.

Source: transformers `Llama4TextAttention`. What a query may see is decided in `attention_plan`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4_dist.config import ModelConfig
from llama4_dist.model.attention_plan import DecodeAttention, LayerPlan, PrefillAttention, StepPlan
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.linear import linear, padded_rows
from llama4_dist.model.norm import rms_norm
from llama4_dist.model.rope import rotate
from llama4_dist.model.weights import Weights


class Attention:
    """Attention of layer `layer`: with rotation, or without and with a temperature; over its chunk, or over all.

    With a rank's heads only it returns a summand of the output.
    """

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.has_rope = config.rope_layers[layer]
        self.has_qk_norm = config.use_qk_norm and self.has_rope
        self.has_temperature = config.temperature_tuning and not self.has_rope
        self.eps = config.rms_norm_eps
        prefix = f"model.layers.{layer}.self_attn"
        self.qkv_weight = weights.linear(*(f"{prefix}.{name}_proj.weight" for name in "qkv"))
        self.o_weight = weights.linear(f"{prefix}.o_proj.weight")

    def __call__(self, x_TD: Tensor, plan: StepPlan, cache: KVCache) -> Tensor:
        layer_plan = plan.for_layer(self.layer)
        heads_THC = linear(x_TD, self.qkv_weight).view(x_TD.shape[0], -1, self.head_dim)
        qk_THC, v_TGC = heads_THC.tensor_split([self.num_heads + self.num_kv_heads], dim=1)
        if self.has_rope:
            qk_THC = rotate(qk_THC, plan.rotation_T1C)
        if self.has_qk_norm:
            qk_THC = rms_norm(qk_THC, None, self.eps)
        q_THC, k_TGC = qk_THC.tensor_split([self.num_heads], dim=1)
        if self.has_temperature:
            q_THC = (q_THC * plan.temperature_T11).to(x_TD.dtype)
        cache.write(self.layer, layer_plan.slots_T, k_TGC[: plan.num_tokens], v_TGC[: plan.num_tokens])
        return linear(attend(q_THC, layer_plan, self.layer, cache).flatten(1), self.o_weight)


def attend(q_THC: Tensor, plan: LayerPlan, layer: int, cache: KVCache) -> Tensor:
    """Return softmax(q · k / √C) · v per query, [T, H, C]; padding rows are 0."""
    o_THC = torch.zeros_like(q_THC, memory_format=torch.contiguous_format)
    for part in plan.prefill:
        o_THC[part.start : part.stop] = _attend_chunk(q_THC[part.start : part.stop], part, layer, cache)
    for group in plan.decode:
        o_THC.index_copy_(0, group.rows_B, _attend_tokens(q_THC.index_select(0, group.rows_B), group, layer, cache))
    return o_THC


def _attend_chunk(q_QHC: Tensor, part: PrefillAttention, layer: int, cache: KVCache) -> Tensor:
    num_queries = q_QHC.shape[0]
    k_1GSC, v_1GSC = cache.read(layer, part.slots_1S)
    q_HQC = F.pad(q_QHC, (0, 0, 0, 0, 0, part.mask_QS.shape[0] - num_queries)).transpose(0, 1)
    o_1HQC = F.scaled_dot_product_attention(q_HQC[None], k_1GSC, v_1GSC, attn_mask=part.mask_QS, enable_gqa=True)
    return o_1HQC[0, :, :num_queries].transpose(0, 1)


def _attend_tokens(q_BHC: Tensor, group: DecodeAttention, layer: int, cache: KVCache) -> Tensor:
    k_BGSC, v_BGSC = cache.read(layer, group.slots_BS)
    # Query heads of one key head become the rows of one product, as prefill's queries are, and are tiled like them.
    num_rows = q_BHC.shape[1] // k_BGSC.shape[1]
    q_BGHC = q_BHC.view(len(q_BHC), -1, num_rows, q_BHC.shape[2])
    q_BGHC = F.pad(q_BGHC, (0, 0, 0, padded_rows(num_rows) - num_rows))
    o_BGHC = F.scaled_dot_product_attention(q_BGHC, k_BGSC, v_BGSC, attn_mask=group.mask_B11S)
    return o_BGHC[:, :, :num_rows].flatten(1, 2)
