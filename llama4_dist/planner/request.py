"""What is asked of the planner: a model, devices, a load and an objective; checked once."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import isfinite

from llama4_dist.errors import ConfigError
from llama4_dist.planner.geometry import Geometry
from llama4_dist.planner.hardware import Efficiency, Hardware, Rates, rates
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.parse import positive
from llama4_dist.planner.roofline import Traffic


class Objective(StrEnum):
    """What makes one layout better than another."""

    THROUGHPUT = "throughput"  # most tokens a second of the cluster
    LATENCY = "latency"  # least time per token
    COST = "cost"  # least money per token


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """`batch` is what the whole cluster decodes together, None = what is best; `defaults` holds the formats."""

    model: str
    synthetic: bool  # nobody has published this geometry
    geometry: Geometry
    hardware: Hardware
    num_gpus: int
    traffic: Traffic
    defaults: Layout
    efficiency: Efficiency = field(default_factory=Efficiency)
    measured_rates: bool = False
    objective: Objective = Objective.THROUGHPUT
    slo_tpot_s: float | None = None
    batch: int | None = None
    price_per_hour: float | None = None
    memory_share: float = 0.95  # of a device; the rest is for activations, buffers and the runtime

    def __post_init__(self) -> None:
        positive("slo_tpot", self.slo_tpot_s)
        positive("price", self.price_per_hour)
        if self.batch is not None and not 1 <= self.batch <= 1 << 24:
            raise ConfigError(f"batch={self.batch} must be from 1 to {1 << 24} sequences, or left out")
        if not (isfinite(self.memory_share) and 0 < self.memory_share <= 1):
            raise ConfigError(f"memory_share={self.memory_share} must lie above 0 and at most at 1")
        longest = self.geometry.config.max_position_embeddings
        if not 1 <= self.traffic.context <= longest:
            raise ConfigError(f"context={self.traffic.context} must be from 1 to the model's {longest} positions")
        self.rates(self.defaults)  # refuses formats that this hardware does not multiply

    def rates(self, layout: Layout) -> Rates:
        return rates(self.hardware, self.efficiency, dtype=layout.dtype, link=layout.link, measured=self.measured_rates)

    @property
    def bytes_per_gpu(self) -> float:
        """What of a device's memory a plan may use."""
        return self.hardware.memory_bytes * self.memory_share

    @property
    def price(self) -> float:
        """Price of one device for an hour."""
        return self.hardware.price_per_hour if self.price_per_hour is None else self.price_per_hour

    def with_layout(self, **changes: int) -> Layout:
        """Return the default layout with some numbers replaced."""
        return replace(self.defaults, **changes)  # type: ignore[arg-type]
