"""What one accelerator can do, by datasheet and as measured; plain numbers, nothing is probed.

Datasheets: NVIDIA H100 and H200 SXM, B200 (HGX). Products are dense, without sparsity. NVLink and the NIC are one way
per GPU; the NIC is a 400 Gb/s port each. Prices are **examples** for comparing layouts, no quotes: give `--price`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType

from llama4_dist.errors import ConfigError

GB, TB, TFLOP = 1e9, 1e12, 1e12
PRICE_SOURCE = "example, no quote; override with --price"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of device. Bandwidths are bytes/s, products FLOP/s by weight format, memory bytes, price per hour.

    `measured_*` is what a run on such a device reached, where one was made; None or absent where not.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float  # BW
    flops: Mapping[str, float]  # FL
    nvlink_bandwidth: float  # BWn inside a node
    nic_bandwidth: float  # BWn between nodes
    host_bandwidth: float  # from the node's memory (PCIe)
    storage_bandwidth: float
    devices_per_node: int
    price_per_hour: float
    measured_memory_bandwidth: float | None = None
    measured_flops: Mapping[str, float] = field(default_factory=dict)


def _gpu(name: str, memory_gb: float, bandwidth_tb: float, bf16: float, fp8: float, **more: float) -> Hardware:
    measured = more.pop("measured_tb", None)
    products = more.pop("measured_bf16", None)
    return Hardware(
        name=name,
        memory_bytes=memory_gb * GB,
        memory_bandwidth=bandwidth_tb * TB,
        # Weights of 4 bits are unpacked and multiplied in bf16.
        flops={"bf16": bf16 * TFLOP, "fp8": fp8 * TFLOP, "int8": fp8 * TFLOP, "int4": bf16 * TFLOP},
        nvlink_bandwidth=more.get("nvlink_gb", 450) * GB,
        nic_bandwidth=50 * GB,
        host_bandwidth=55 * GB,
        storage_bandwidth=12 * GB,
        devices_per_node=8,
        price_per_hour=more["price"],
        measured_memory_bandwidth=None if measured is None else measured * TB,
        measured_flops={} if products is None else {"bf16": products * TFLOP},
    )


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        "H100": _gpu("H100", 80, 3.35, 989, 1979, price=2.5),
        # Measured on one H200: a copy, and a square bf16 product (docs/log.md).
        "H200": _gpu("H200", 141, 4.8, 990, 1979, price=3.5, measured_tb=4.3, measured_bf16=785),
        "B200": _gpu("B200", 180, 8.0, 2250, 4500, nvlink_gb=900, price=5.5),
        # One socket of a current server; a real machine is fitted by benchmarks/calibrate.py.
        "CPU": Hardware(
            name="CPU",
            memory_bytes=256 * GB,
            memory_bandwidth=300 * GB,
            flops={"float32": 3 * TFLOP, "bf16": 6 * TFLOP, "int8": 12 * TFLOP},
            nvlink_bandwidth=20 * GB,
            nic_bandwidth=12.5 * GB,
            host_bandwidth=300 * GB,
            storage_bandwidth=3 * GB,
            devices_per_node=1,
            price_per_hour=1.5,
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of the datasheet that kernels and links reach, and the fixed costs of a message.

    `alpha_s` is one way from an attention GPU to an expert host; `reduce_alpha_s` one reduction inside a group.
    """

    memory: float = 0.8
    flops: float = 0.6
    network: float = 0.8
    alpha_s: float = 10e-6
    reduce_alpha_s: float = 10e-6
    step_s: float = 0.0  # T_sched: planning, sampling and streaming, once per step

    def __post_init__(self) -> None:
        for name in ("memory", "flops", "network"):
            share = getattr(self, name)
            if not (isfinite(share) and 0 < share <= 1):
                raise ConfigError(f"efficiency {name}={share} must lie above 0 and at most at 1")
        for name in ("alpha_s", "reduce_alpha_s", "step_s"):
            seconds = getattr(self, name)
            if not (isfinite(seconds) and 0 <= seconds < 60):
                raise ConfigError(f"{name}={seconds} must be 0 or more seconds, below a minute")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the formulae divide by: everything after efficiency. Bytes/s, FLOP/s, seconds."""

    memory: float  # BW
    flops: float  # FL at the weights' format
    link: float  # BWn between attention and experts
    reduce_link: float  # BWn inside a tensor-parallel group
    stage_link: float  # BWn between stages
    alpha_s: float
    reduce_alpha_s: float
    step_s: float


def rates(hardware: Hardware, efficiency: Efficiency, *, dtype: str, link: str, measured: bool = False) -> Rates:
    """Return the rates for weights in `dtype` with experts behind `link`, "nic" or "nvlink".

    With `measured` memory and products are those measured on such a device, without a factor; ConfigError where
    nobody has measured it.
    """
    if dtype not in hardware.flops:
        known = ", ".join(hardware.flops)
        raise ConfigError(f"{hardware.name} multiplies no {dtype} weights in this table: choose one of {known}")
    if link not in ("nic", "nvlink"):
        raise ConfigError(f"link={link!r} is neither nic nor nvlink")
    memory, flops = hardware.memory_bandwidth * efficiency.memory, hardware.flops[dtype] * efficiency.flops
    if measured:
        memory, flops = _measured(hardware, dtype)
    between = hardware.nic_bandwidth if link == "nic" else hardware.nvlink_bandwidth
    return Rates(
        memory=memory,
        flops=flops,
        link=between * efficiency.network,
        reduce_link=hardware.nvlink_bandwidth * efficiency.network,
        stage_link=hardware.nic_bandwidth * efficiency.network,
        alpha_s=efficiency.alpha_s,
        reduce_alpha_s=efficiency.reduce_alpha_s,
        step_s=efficiency.step_s,
    )


def _measured(hardware: Hardware, dtype: str) -> tuple[float, float]:
    bandwidth, products = hardware.measured_memory_bandwidth, hardware.measured_flops.get(dtype)
    if bandwidth is None or products is None:
        raise ConfigError(f"nobody has measured {dtype} products on {hardware.name}: leave --rates at datasheet")
    return bandwidth, products


def find_hardware(name: str) -> Hardware:
    """Return an entry of the table by its name in any case; ConfigError lists what there is."""
    found = {entry.lower(): entry for entry in HARDWARE}.get(name.lower())
    if found is None:
        raise ConfigError(f"hardware {name!r} is not in the table: choose one of {', '.join(HARDWARE)}")
    return HARDWARE[found]
