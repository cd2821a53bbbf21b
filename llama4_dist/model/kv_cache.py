"""The tensors that hold keys and values of all sequences; which page belongs to whom is the engine's business."""

import torch
from torch import Tensor

from llama4_dist.config import ModelConfig
from llama4_dist.model.kv_layout import KVLayout, layout_of

KEYS_TOGETHER = 16  # slots whose keys the native passes keep side by side


class KVCache:
    """One pool of pages for all groups of layers: [layers_per_group, 2, num_pages · block_size, G · C].

    Layer l is row `layout.index_in_group[l]`; slot = page · block_size + offset in the block. Keys are stored after
    rotation and QK-norm, so a position's entry never changes. `dtype` is what is stored, `compute_dtype` what `read`
    returns; every query reads what is stored, its own key too, so no token depends on what was computed when.
    `fingerprint` stands for all that an entry depends on besides the tokens up to it. A member of a cut model passes
    the geometry of its part and its stage's `layout`; who only plans passes one without layers, which takes no memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        compute_dtype: torch.dtype | None = None,
        model_hash: str = "",
        layout: KVLayout | None = None,
    ) -> None:
        self.layout = layout or layout_of(config)
        self.num_pages = num_pages
        self.block_size = block_size
        self.dtype = dtype
        self.compute_dtype = compute_dtype or dtype
        self.fingerprint = repr((model_hash, block_size, self.dtype, self.compute_dtype, self.layout)).encode()
        self._row = (config.num_kv_heads, config.head_dim)
        width = config.num_kv_heads * config.head_dim
        num_slots = -(-num_pages * block_size // KEYS_TOGETHER) * KEYS_TOGETHER
        shape = (self.layout.layers_per_group, 2, num_slots, width)
        # Zeros, not empty memory: whatever a slot holds takes part in a product before it is masked away.
        self._storage = torch.zeros(shape, dtype=dtype, device=device)
        rows = [tuple(row) for row in self._storage.view(_moved_as(dtype))]
        self._slots = {layer: rows[index] for layer, index in self.layout.index_in_group.items()}
        self._addresses = {layer: (keys.data_ptr(), values.data_ptr()) for layer, (keys, values) in self._slots.items()}
        self._gathered = torch.empty((2, 0, width), dtype=_moved_as(dtype), device=device)

    @property
    def num_bytes(self) -> int:
        return self._storage.nbytes

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values [num_pages · block_size, G · C] that a layer shares with other groups'."""
        keys, values = self._slots[layer]
        return keys.view(self.dtype), values.view(self.dtype)

    def addresses(self, layer: int) -> tuple[int, int]:
        """Return where the keys and the values of a layer begin; native passes order the keys of 16 slots their way."""
        return self._addresses[layer]

    def write(self, layer: int, slots_T: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Store the keys and values of new tokens."""
        keys, values = self._slots[layer]
        keys.index_copy_(0, slots_T, self._stored(k_TGC))
        values.index_copy_(0, slots_T, self._stored(v_TGC))

    def read(self, layer: int, slots_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Copy out the keys and values at `slots_BS`, each a view [B, G, S, C] that the next `read` overwrites."""
        slots_S = slots_BS.flatten()
        if self._gathered.shape[1] < len(slots_S):  # kept between calls: fresh memory costs a page fault per 4 KiB
            self._gathered = self._gathered.new_empty((2, len(slots_S), self._gathered.shape[2]))
        for tensor, gathered_SD in zip(self._slots[layer], self._gathered, strict=True):
            torch.index_select(tensor, 0, slots_S, out=gathered_SD[: len(slots_S)])
        gathered = self._gathered[:, : len(slots_S)].view(self.dtype).to(self.compute_dtype)
        k_BSGC, v_BSGC = gathered.view(2, *slots_BS.shape, *self._row)
        return k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2)

    def _stored(self, x_TGC: Tensor) -> Tensor:
        x_TD = x_TGC.flatten(1)
        # Past its largest number a float8_e4m3 knows only NaN; torch 2.13 saturates on x86, which is not promised.
        if self.dtype.itemsize == 1:
            largest = torch.finfo(self.dtype).max
            x_TD = x_TD.clamp(-largest, largest)
        return x_TD.to(self.dtype).view(_moved_as(self.dtype))


def _moved_as(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which entries are copied: torch can index no float8."""
    return torch.uint8 if dtype.itemsize == 1 else dtype
