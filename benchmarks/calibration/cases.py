"""The layouts that are measured: some to fit the machine's constants, the others to be predicted."""

from dataclasses import dataclass, replace
from typing import Any

CORES = 2
BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "vocab_size": 8192,
    "num_local_experts": 16,
}
# What differs from BASE. Every model's weights are more than the second-level caches hold.
MODELS: dict[str, dict[str, Any]] = {
    "base": {},
    "wide experts": {"intermediate_size": 2048},
    "many experts": {"num_local_experts": 32},
    "deep": {"num_hidden_layers": 8},
    "narrow": {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1536},
    "wide": {"hidden_size": 1024, "num_attention_heads": 16},
    "few experts": {"num_local_experts": 8, "intermediate_size": 1536},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layout: a model, a batch, a context, and where experts are; `fitted` cases set the constants."""

    model: str
    batch: int
    context: int = 64
    hosts: int = 0  # 0 = in the engine's process
    replicas: int = 1
    slices: int = 1
    fitted: bool = False

    @property
    def attention_threads(self) -> int:
        return CORES if self.hosts == 0 else 1

    @property
    def name(self) -> str:
        place = "in process" if self.hosts == 0 else f"{self.hosts} hosts" + (" x2" if self.replicas > 1 else "")
        cut = f", {self.slices} slices" if self.slices > 1 else ""
        return f"{self.model}, batch {self.batch}, context {self.context}, {place}{cut}"


ANCHOR = Case(model="base", batch=8)  # measured beside every other case; all times are told in its own

FITTED = (
    Case(model="base", batch=1),
    Case(model="base", batch=8),
    Case(model="base", batch=32),
    Case(model="base", batch=4, context=4096),
    Case(model="wide experts", batch=8),
    Case(model="narrow", batch=16),
    Case(model="narrow", batch=2),
    Case(model="base", batch=1, hosts=2),
    Case(model="base", batch=32, hosts=2),
    Case(model="base", batch=8, hosts=1),
    Case(model="narrow", batch=8, hosts=2),
)
PREDICTED = (
    Case(model="base", batch=4),
    Case(model="base", batch=16),
    Case(model="base", batch=1, context=8000),
    Case(model="base", batch=8, context=2048),
    Case(model="wide experts", batch=1),
    Case(model="wide experts", batch=24),
    Case(model="many experts", batch=4),
    Case(model="many experts", batch=16),
    Case(model="deep", batch=2),
    Case(model="deep", batch=12),
    Case(model="wide", batch=4),
    Case(model="wide", batch=16, context=1024),
    Case(model="few experts", batch=6),
    Case(model="base", batch=4, hosts=2),
    Case(model="base", batch=16, hosts=2),
    Case(model="base", batch=16, hosts=1),
    Case(model="base", batch=8, hosts=2, replicas=2),
    Case(model="wide experts", batch=8, hosts=2),
    Case(model="many experts", batch=16, hosts=2),
    Case(model="few experts", batch=6, hosts=3),
)
WITH_SLICES = (Case(model="base", batch=8, hosts=2, slices=2),)  # where the engine cuts experts


def all_cases(*, can_slice: bool) -> list[Case]:
    """Return every case to measure, the fitted ones marked."""
    fitted = [replace(case, fitted=True) for case in FITTED]
    return [*fitted, *PREDICTED, *(WITH_SLICES if can_slice else ())]
