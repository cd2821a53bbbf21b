"""Muon for the hidden matrices, AdamW for the rest; knows parameters by name and no model by type."""

import torch
from torch import Tensor, nn

ADAM_RATES = {"embed_tokens": 6e-3, "lm_head": 3e-3, "router": 2e-3, "norm": 3e-3}
MUON_RATE = 0.02
MUON_DECAY = 0.1
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised matrix by matrix (K. Jordan et al., "Muon", 2024); takes stacks of matrices too."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__([{"params": params, "lr": MUON_RATE, "base_lr": MUON_RATE}], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonalised(p.grad.lerp(momentum, MOMENTUM))
                gain = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * MUON_DECAY).add_(update, alpha=-group["lr"] * gain)


def orthogonalised(gradient: Tensor, num_steps: int = 5) -> Tensor:
    """Push all singular values towards one by the quintic Newton-Schulz iteration of the Muon write-up."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(gradient.dtype)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon and AdamW over disjoint parameters, each group remembering its peak rate as base_lr."""
    hidden: list[nn.Parameter] = []
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in ADAM_RATES}
    for name, p in model.named_parameters():
        kind = next((kind for kind in ADAM_RATES if kind in name), None)
        (hidden if kind is None else groups[kind]).append(p)
    adam = [{"params": groups[kind], "lr": rate, "base_lr": rate} for kind, rate in ADAM_RATES.items()]
    return [Muon(hidden), torch.optim.AdamW(adam, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)]
