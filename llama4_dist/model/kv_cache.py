"""The tensors that hold keys and values of all sequences; which block belongs to whom is the engine's business."""

import torch
from torch import Tensor

from llama4_dist.config import ModelConfig


class KVCache:
    """Per layer keys and values [num_blocks · block_size, G, C]; slot = block · block_size + offset in the block.

    Keys are stored after rotation and QK-norm, so a position's entry never changes.
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._row = (config.num_kv_heads, config.head_dim)
        width = config.num_kv_heads * config.head_dim
        shape = (config.num_layers, 2, num_blocks * block_size, width)
        # Zeros, not empty memory: whatever a slot holds takes part in a product before it is masked away.
        self._slots = [tuple(layer) for layer in torch.zeros(shape, dtype=dtype, device=device)]
        self._gathered = torch.empty((2, 0, width), dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return sum(slots.nbytes for layer in self._slots for slots in layer)

    def write(self, layer: int, slots_T: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Store the keys and values of new tokens."""
        keys, values = self._slots[layer]
        keys.index_copy_(0, slots_T, k_TGC.flatten(1))
        values.index_copy_(0, slots_T, v_TGC.flatten(1))

    def read(self, layer: int, slots_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Copy out the keys and values at `slots_BS`, each a view [B, G, S, C] that the next `read` overwrites."""
        slots_S = slots_BS.flatten()
        if self._gathered.shape[1] < len(slots_S):  # kept between calls: fresh memory costs a page fault per 4 KiB
            self._gathered = self._gathered.new_empty((2, len(slots_S), self._gathered.shape[2]))
        for tensor, gathered_SD in zip(self._slots[layer], self._gathered, strict=True):
            torch.index_select(tensor, 0, slots_S, out=gathered_SD[: len(slots_S)])
        k_BSGC, v_BSGC = self._gathered[:, : len(slots_S)].view(2, *slots_BS.shape, *self._row)
        return k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2)
