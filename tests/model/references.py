"""What transformers computes from the same checkpoint; the yardstick of this folder's tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration, logging


def load_reference(path: Path, preset: str, *, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """Load the checkpoint as a transformers model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind = Llama4ForConditionalGeneration if preset == "conditional" else Llama4ForCausalLM
    return kind.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()


def reference_logits(model: Any, token_ids: list[int]) -> Tensor:
    """Logits [T, V] of one unpadded sequence (padded batches count temperature from the padding on)."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids])).logits[0].float()
