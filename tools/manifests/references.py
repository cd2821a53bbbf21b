"""Checks that what objects name exists: pods behind selectors, ports behind names, Secrets, ConfigMaps and volumes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.manifests.objects import Object, Overlay, Pod, identity, selects

README = Path(__file__).parents[2] / "deploy" / "kubernetes" / "README.md"
_ROW = re.compile(r"^\| `([a-z0-9-]+)` \| `([a-z_.]+(?:`, `[a-z_.]+)*)` \|", re.MULTILINE)


def check_references(overlay: Overlay) -> Iterator[str]:
    """Yield every name that leads nowhere."""
    yield from _selectors(overlay)
    yield from _services(overlay)
    yield from _budgets(overlay)
    yield from _monitors(overlay)
    for pod in overlay.pods():
        yield from _pod_references(overlay, pod)


def operators_secrets() -> dict[str, set[str]]:
    """Return the Secrets that the README says an operator makes, with their keys."""
    rows = _ROW.findall(README.read_text(encoding="utf-8"))
    return {name: set(keys.split("`, `")) for name, keys in rows}


def _selectors(overlay: Overlay) -> Iterator[str]:
    for one in overlay.of("Deployment"):
        labels = one["spec"]["template"]["metadata"].get("labels", {})
        if not selects(one["spec"]["selector"], labels):
            yield f"{identity(one)}: its selector does not choose its own pods"


def _services(overlay: Overlay) -> Iterator[str]:
    for one in overlay.of("Service"):
        chosen = [pod for pod in overlay.pods() if selects({"matchLabels": one["spec"]["selector"]}, pod.labels)]
        if not chosen:
            yield f"{identity(one)}: its selector chooses no pod"
        for pod in chosen:
            for port in one["spec"]["ports"]:
                if port.get("targetPort", port["port"]) not in pod.ports():
                    yield f"{identity(one)}: {pod.name} has no port {port.get('targetPort', port['port'])}"


def _budgets(overlay: Overlay) -> Iterator[str]:
    for one in overlay.of("PodDisruptionBudget"):
        chosen = [pod for pod in overlay.pods() if selects(one["spec"]["selector"], pod.labels)]
        if not chosen:
            yield f"{identity(one)}: its selector chooses no pod"
        if any(pod.owner == "RayCluster" for pod in chosen) and not isinstance(one["spec"].get("minAvailable"), int):
            yield f"{identity(one)}: pods of a RayCluster need minAvailable as a number (it has no scale subresource)"


def _monitors(overlay: Overlay) -> Iterator[str]:
    for one in overlay.of("ServiceMonitor"):
        services = [s for s in overlay.of("Service") if selects(one["spec"]["selector"], s["metadata"]["labels"])]
        offered = {port["name"] for service in services for port in service["spec"]["ports"]}
        for endpoint in one["spec"]["endpoints"]:
            if endpoint["port"] not in offered:
                yield f"{identity(one)}: no Service that it selects has a port {endpoint['port']}"
    for one in overlay.of("PodMonitor"):
        pods = [pod for pod in overlay.pods() if selects(one["spec"]["selector"], pod.labels)]
        if not pods:
            yield f"{identity(one)}: its selector chooses no pod"
        for pod in pods:
            for endpoint in one["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in pod.ports():
                    yield f"{identity(one)}: {pod.name} has no port {endpoint['port']}"


def _pod_references(overlay: Overlay, pod: Pod) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
    for container in pod.containers:
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                yield f"{pod.name}: {container['name']} mounts {mount['name']}, which is no volume of the pod"
    if (account := pod.spec.get("serviceAccountName", "default")) not in overlay.names("ServiceAccount"):
        yield f"{pod.name}: service account {account} is not defined"
    for kind, name, key in _named(pod):
        yield from (f"{pod.name}: {problem}" for problem in _missing(overlay, kind, name, key))
    if pod.owner == "RayCluster":
        (cluster,) = overlay.of("RayCluster")
        secret = cluster["spec"].get("authOptions", {}).get("secretName")
        yield from (f"{pod.name}: {problem}" for problem in _missing(overlay, "Secret", secret, "auth_token"))


def _missing(overlay: Overlay, kind: str, name: str, key: str | None) -> Iterator[str]:
    if kind == "Secret":
        documented = operators_secrets()
        if name not in documented:
            yield f"Secret {name} is neither defined nor named in {README.name}"
        elif key is not None and key not in documented[name]:
            yield f"Secret {name} has no key {key} by {README.name}"
        return
    if name not in overlay.names(kind):
        yield f"{kind} {name} is not defined"
        return
    (found,) = (one for one in overlay.of(kind) if one["metadata"]["name"] == name)
    if key is not None and key not in found.get("data", {}):
        yield f"{kind} {name} has no key {key}"


def _named(pod: Pod) -> Iterator[tuple[str, str, str | None]]:
    """Yield (kind, name, key) of all that a pod refers to."""
    for volume in pod.spec.get("volumes", ()):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"], None
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], None
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None
    for container in pod.containers:
        yield from _of_environment(container)


def _of_environment(container: Object) -> Iterator[tuple[str, str, str | None]]:
    for entry in container.get("env", ()):
        source: dict[str, Any] = entry.get("valueFrom", {})
        for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
            if field in source:
                yield kind, source[field]["name"], source[field]["key"]
