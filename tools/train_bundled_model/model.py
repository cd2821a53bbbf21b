"""A trainable Llama 4 text decoder whose state dict carries the published tensor names; knows no files.

Follows transformers 5.23.0 models/llama4/modeling_llama4.py in what it computes, not in how: chunked layers
attend inside folded chunks, and each expert reads only the rows routed to it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The numbers of the bundled model; config.json is written from them."""

    vocab_size: int = 4096
    dim: int = 192
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 16
    expert_dim: int = 224
    chunk: int = 128
    rope_layers: tuple[int, ...] = (1, 1, 0, 1, 1, 0)
    rope_theta: float = 500_000.0
    eps: float = 1e-5


def weight(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * std)


class Linear(nn.Linear):
    """A bias-free linear map initialised for unit-variance input."""

    def __init__(self, num_in: int, num_out: int, std: float | None = None) -> None:
        super().__init__(num_in, num_out, bias=False)
        nn.init.normal_(self.weight, std=num_in**-0.5 if std is None else std)


class Attention(nn.Module):
    def __init__(self, g: Geometry, rope: bool) -> None:
        super().__init__()
        self.g, self.rope = g, rope
        self.q_proj = Linear(g.dim, g.num_heads * g.head_dim)
        self.k_proj = Linear(g.dim, g.num_kv_heads * g.head_dim)
        self.v_proj = Linear(g.dim, g.num_kv_heads * g.head_dim)
        self.o_proj = Linear(g.num_heads * g.head_dim, g.dim, std=0.02)

    def forward(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x_BTD.shape
        fold = length if not self.rope else self.g.chunk
        assert length % fold == 0, f"{length=} is not a multiple of the attention chunk"
        q, k, v = (
            proj(x_BTD).view(batch, length, -1, self.g.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope:
            q, k = (F.rms_norm(rotated(t, turn).float(), t.shape[-1:], eps=self.g.eps).to(v.dtype) for t in (q, k))
        q, k, v = (t.reshape(-1, fold, t.shape[2], t.shape[3]).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(self.g.num_heads // self.g.num_kv_heads, dim=1) for t in (k, v))
        # Fused attention is the slower one on short chunks.
        out = attended(q, k, v) if self.rope else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention of [chunks, heads, T, C] in the open."""
    length = q.shape[-2]
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
    return (q @ k.mT * q.shape[-1] ** -0.5 + future).softmax(dim=-1) @ v


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn adjacent pairs of [B, T, H, C] by their position's angles."""
    cos, sin = turn
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class SharedExpert(nn.Module):
    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(g.dim, g.expert_dim), Linear(g.dim, g.expert_dim)
        self.down_proj = Linear(g.expert_dim, g.dim, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.gate_up_proj = weight(g.num_experts, g.dim, 2 * g.expert_dim, std=g.dim**-0.5)
        self.down_proj = weight(g.num_experts, g.expert_dim, g.dim, std=0.02)

    def forward(self, x_RD: Tensor, num_rows: list[int]) -> Tensor:
        """Run rows sorted by expert; each weight is cast once for the whole batch."""
        gate_up, down = self.gate_up_proj.to(x_RD.dtype), self.down_proj.to(x_RD.dtype)
        outs = []
        for expert, rows in enumerate(x_RD.split(num_rows)):
            gate, up = (rows @ gate_up[expert]).chunk(2, dim=-1)
            outs.append((F.silu(gate) * up) @ down[expert])
        return torch.cat(outs)


class FeedForward(nn.Module):
    """Top-1 routing: the sigmoid of the chosen logit scales what the expert reads."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.router = Linear(g.dim, g.num_experts, std=0.02)
        self.experts, self.shared_expert = Experts(g), SharedExpert(g)
        self.balance = torch.zeros(())
        self.num_rows: list[int] = []

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        logits_TE = self.router(x_TD).float()
        top_T, choice_T = logits_TE.max(dim=-1)
        num_rows_E = torch.bincount(choice_T, minlength=logits_TE.shape[-1])
        # Switch Transformer (arXiv 2101.03961) eq. 4: counts carry no gradient, mean probabilities do.
        share_E = num_rows_E.float() / len(x_TD)
        self.balance = len(share_E) * (share_E * logits_TE.softmax(dim=-1).mean(dim=0)).sum()
        self.num_rows = num_rows_E.tolist()
        order_T = choice_T.argsort(stable=True)
        arrived_RD = x_TD[order_T] * top_T.sigmoid()[order_T, None].to(x_TD.dtype)
        y_RD = self.experts(arrived_RD, self.num_rows)
        y_TD = torch.zeros_like(y_RD).index_copy(0, order_T, y_RD)
        return (y_TD + self.shared_expert(x_TD)).view_as(x_BTD)


class Layer(nn.Module):
    def __init__(self, g: Geometry, rope: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(g.dim, eps=g.eps)
        self.self_attn = Attention(g, rope)
        self.post_attention_layernorm = nn.RMSNorm(g.dim, eps=g.eps)
        self.feed_forward = FeedForward(g)

    def forward(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        # The residual stream stays float32 in training; only the branches run in the given type.
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD).to(dtype), turn)
        return x_BTD + self.feed_forward(self.post_attention_layernorm(x_BTD).to(dtype))


class Decoder(nn.Module):
    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(g.vocab_size, g.dim)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        self.layers = nn.ModuleList(Layer(g, bool(rope)) for rope in g.rope_layers)
        self.norm = nn.RMSNorm(g.dim, eps=g.eps)


class MiniLlama4(nn.Module):
    """The whole model; parameter names equal those of transformers' Llama4ForCausalLM."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.model = Decoder(g)
        self.lm_head = Linear(g.dim, g.vocab_size, std=0.02)

    def forward(self, ids_BT: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what lm_head reads, [B, T, D]; run under autocast when dtype is bfloat16."""
        length = ids_BT.shape[1]
        speeds = self.g.rope_theta ** (-torch.arange(0, self.g.head_dim, 2).float() / self.g.head_dim)
        angles = torch.outer(torch.arange(length).float(), speeds)[:, None, :]
        turn = (angles.cos(), angles.sin())
        x_BTD = self.model.embed_tokens(ids_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, turn, dtype)
        return self.model.norm(x_BTD).to(dtype)

    @property
    def feed_forwards(self) -> list[FeedForward]:
        return [module for module in self.modules() if isinstance(module, FeedForward)]
