"""Reads what a deployment needs of a plan, `llama4_dist.plan/1`; knows no formula by which it was found."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama4_dist.errors import ConfigError

SCHEMA = "llama4_dist.plan/1"
MAX_FILE_BYTES = 4 * 1024 * 1024
CPU = "CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployPlan:
    """`groups` attention groups of `stages` x `ranks` devices and `hosts` expert hosts; bytes are of one device."""

    model: str
    synthetic: bool
    hardware: str
    num_devices: int  # what there is, not what is used
    devices_per_node: int
    device_bytes: int
    groups: int
    stages: int
    ranks: int
    hosts: int
    devices_per_host: int
    slices: int
    replicas: int
    dtype: str
    wire: str
    kv_dtype: str
    context: int
    sequences: int  # of one group
    microbatches: int
    attention_bytes: int
    kv_bytes: int
    expert_bytes: int

    def __post_init__(self) -> None:
        if self.devices_used > self.num_devices:
            raise ConfigError(f"the plan uses {self.devices_used} devices of {self.num_devices}: plan it again")
        if self.ranks > self.devices_per_node > 1:
            raise ConfigError(
                f"ranks={self.ranks} of a stage share a pod and a node has {self.devices_per_node} devices: "
                "plan fewer ranks"
            )
        for role, held in (("attention", self.attention_bytes), ("expert", self.expert_bytes)):
            if held > self.device_bytes:
                raise ConfigError(f"an {role} device would hold {held} of {self.device_bytes} bytes: plan it again")

    @property
    def on_cpu(self) -> bool:
        return self.hardware == CPU

    @property
    def devices_used(self) -> int:
        return self.groups * self.stages * self.ranks + self.hosts * self.devices_per_host

    @property
    def spare_hosts(self) -> int:
        """How many more expert hosts the hardware has room for."""
        return (self.num_devices - self.devices_used) // self.devices_per_host


def read_plan(file: Path) -> DeployPlan:
    """Read a plan; raise ConfigError naming the file and the field that is missing or wrong."""
    try:
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise ConfigError(f"{file}: {size} bytes, a plan has at most {MAX_FILE_BYTES}")
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    try:
        return parse_plan(document)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.message}") from None


def parse_plan(document: Any) -> DeployPlan:
    """Pick the fields; unknown ones are left aside, as the schema's rule of growth demands."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ConfigError(f"this is no plan of schema {SCHEMA}: write one with `llama4-dist plan … --out FILE`")
    layout, hardware = _part(document, "layout"), _part(document, "hardware")
    model, groups = _part(document, "model"), _worker_groups(document)
    return DeployPlan(
        model=_text(model, "name"),
        synthetic=bool(model.get("synthetic", False)),
        hardware=_text(hardware, "kind"),
        num_devices=_number(hardware, "available"),
        devices_per_node=_number(hardware, "devices_per_node"),
        device_bytes=_number(hardware, "memory_bytes"),
        groups=_number(layout, "groups"),
        stages=_number(layout, "stages"),
        ranks=_number(layout, "ranks"),
        hosts=_number(layout, "hosts"),
        devices_per_host=_number(layout, "gpus_per_host"),
        slices=_number(layout, "slices"),
        replicas=_number(layout, "replicas"),
        dtype=_text(layout, "dtype"),
        wire=_text(layout, "wire_dtype"),
        kv_dtype=_text(layout, "kv_dtype"),
        context=_number(_part(document, "workload"), "context"),
        sequences=_number(layout, "batch"),
        microbatches=_number(layout, "microbatches"),
        attention_bytes=_number(groups["attention"], "gpu_memory_bytes"),
        kv_bytes=_number(groups["attention"], "kv_bytes"),
        expert_bytes=_number(groups["expert"], "gpu_memory_bytes"),
    )


def _worker_groups(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    listed = document.get("worker_groups")
    found: dict[str, Mapping[str, Any]] = {
        str(group.get("role")): group for group in listed or () if isinstance(group, dict)
    }
    for role in ("attention", "expert"):
        if role not in found:
            raise ConfigError(f"worker_groups has no group of role {role}")
    return found


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = document.get(name)
    if not isinstance(part, dict):
        raise ConfigError(f"{name} is missing or no object")
    return part


def _number(part: Mapping[str, Any], name: str) -> int:
    value = part.get(name)
    if type(value) is not int or not 1 <= value < 1 << 60:
        raise ConfigError(f"{name}={value!r} must be a whole number above 0")
    return value


def _text(part: Mapping[str, Any], name: str) -> str:
    value = part.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}={value!r} must be text")
    return value
