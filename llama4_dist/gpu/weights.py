"""The weights of the whole model on one device, and how they are read from a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from llama4_dist.checkpoint.expert_weights import ExpertWeights
from llama4_dist.checkpoint.quantised import QuantisedExpertWeights, QuantisedLinear
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.errors import ConfigError
from llama4_dist.gpu.packed import FORMATS, Packed
from llama4_dist.gpu.stored_formats import pack_experts
from llama4_dist.model.weight_format import check_stored_format


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """One decoder layer. `gate_up` and `down` hold all routed experts and after them the shared one.

    A dense layer has no router and one entry. A MoE layer whose routed experts are elsewhere has the shared one alone.
    Where the routed ones are stored quantised, the shared one, which is not, stands apart in `shared`: gate_up, down.
    """

    input_norm_D: Tensor
    qkv: Packed
    o: Packed
    post_attention_norm_D: Tensor
    router_ED: Tensor | None
    gate_up: Packed
    down: Packed
    shared: tuple[Packed, Packed] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelWeights:
    """All that a forward pass reads."""

    embedding_VD: Tensor
    layers: tuple[LayerWeights, ...]
    norm_D: Tensor
    head: Packed


def load_weights(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    expert_format: str = "stored",
    with_routed: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ModelWeights:
    """Read every weight, or all but the routed experts', in `dtype`, to `device`.

    `progress` is told (layers read, layers in all).

    `expert_format` is one of `packed.FORMATS`: how feed-forward weights, which are most of the model, are kept.
    """
    if expert_format not in FORMATS:
        raise ConfigError(f"expert_format={expert_format!r} is none of {', '.join(FORMATS)}")
    check_stored_format(expert_format, checkpoint.scheme)
    reader = WeightReader(checkpoint, dtype, device, expert_format)
    layers = []
    for layer in range(checkpoint.config.num_layers):
        layers.append(reader.layer(layer, with_routed=with_routed))
        if progress:
            progress(layer + 1, checkpoint.config.num_layers)
    return ModelWeights(
        embedding_VD=reader.tensor("model.embed_tokens.weight"),
        layers=tuple(layers),
        norm_D=reader.tensor("model.norm.weight"),
        head=reader.linear("lm_head.weight"),
    )


class WeightReader:
    """Reads tensors by canonical name and lays them out for the kernels."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, expert_format: str) -> None:
        self._expert_format = expert_format
        self._checkpoint = checkpoint
        self._config: ModelConfig = checkpoint.config
        self._dtype = dtype
        self._device = device

    def tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name).to(device=self._device, dtype=self._dtype)

    def linear(self, *names: str) -> Packed:
        """Return linears of one input as one."""
        return Packed(values_EFD=torch.cat([self.tensor(name) for name in names])[None])

    def layer(self, layer: int, *, with_routed: bool) -> LayerWeights:
        prefix = f"model.layers.{layer}"
        is_moe = self._config.moe_layers[layer]
        mlp = f"{prefix}.feed_forward.shared_expert" if is_moe else f"{prefix}.feed_forward"
        gate_up = self.linear(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        down = self.linear(f"{mlp}.down_proj.weight")
        shared = None
        if is_moe and with_routed:
            if self._is_quantised(layer):
                shared = (gate_up, down)
                gate_up, down = self._stored_experts(layer)
            else:
                gate_up, down = self._with_experts(layer, gate_up, down)
        return LayerWeights(
            input_norm_D=self.tensor(f"{prefix}.input_layernorm.weight"),
            qkv=self.linear(*(f"{prefix}.self_attn.{name}_proj.weight" for name in "qkv")),
            o=self.linear(f"{prefix}.self_attn.o_proj.weight"),
            post_attention_norm_D=self.tensor(f"{prefix}.post_attention_layernorm.weight"),
            router_ED=self.tensor(f"{prefix}.feed_forward.router.weight") if is_moe else None,
            gate_up=gate_up.quantized(self._expert_format),
            down=down.quantized(self._expert_format),
            shared=shared,
        )

    def _is_quantised(self, layer: int) -> bool:
        quantised = [isinstance(self._checkpoint.expert(layer, e), QuantisedExpertWeights) for e in self._experts()]
        if any(quantised) != all(quantised):
            raise ConfigError(
                f"layer {layer} has {sum(quantised)} quantised experts of {len(quantised)}: on this device "
                "all of a layer or none can be; take device='cpu'"
            )
        return all(quantised)

    def _stored_experts(self, layer: int) -> tuple[Packed, Packed]:
        def pack(parts: Callable[[QuantisedExpertWeights], tuple[QuantisedLinear, ...]]) -> Packed:
            experts = (cast(QuantisedExpertWeights, self._checkpoint.expert(layer, e)) for e in self._experts())
            linears = (parts(weights) for weights in experts)
            return pack_experts(linears, self._config.num_experts, dtype=self._dtype, device=self._device)

        return pack(lambda weights: (weights.gate_FD, weights.up_FD)), pack(lambda weights: (weights.down_DF,))

    def _experts(self) -> range:
        return range(self._config.num_experts)

    def _with_experts(self, layer: int, shared_gate_up: Packed, shared_down: Packed) -> tuple[Packed, Packed]:
        num_experts, width = self._config.num_experts, self._config.expert_width
        gate_up_EFD = self._empty(num_experts + 1, *shared_gate_up.values_EFD.shape[1:])
        down_EDF = self._empty(num_experts + 1, *shared_down.values_EFD.shape[1:])
        for expert in range(num_experts):
            weights = self._checkpoint.expert(layer, expert)  # stored input-major: turned on the device
            assert isinstance(weights, ExpertWeights), "quantised experts are stacked by themselves"
            gate_up_EFD[expert, :width] = self._moved(weights.gate_DF).T
            gate_up_EFD[expert, width:] = self._moved(weights.up_DF).T
            down_EDF[expert] = self._moved(weights.down_FD).T
        gate_up_EFD[num_experts] = shared_gate_up.values_EFD[0]
        down_EDF[num_experts] = shared_down.values_EFD[0]
        return Packed(values_EFD=gate_up_EFD), Packed(values_EFD=down_EDF)

    def _moved(self, weight_DF: Tensor) -> Tensor:
        return weight_DF.to(device=self._device, dtype=self._dtype)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)
