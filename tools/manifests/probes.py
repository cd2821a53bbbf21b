"""Checks that probes ask for what is there, and that nothing is killed before it could end its work."""

from collections.abc import Iterator

from llama4_dist.gateway.health import Health
from tools.manifests.commands import settings_of
from tools.manifests.objects import Object, Overlay, Pod

KINDS = ("startupProbe", "livenessProbe", "readinessProbe")
TLS_FLAG = "--tls-certificate"


def check_probes(overlay: Overlay) -> Iterator[str]:
    """Yield probes that can never succeed, and pods that have none or too little time."""
    for pod in overlay.pods():
        if pod.owner == "Job":
            continue
        for container in pod.spec["containers"]:
            for kind in KINDS:
                if kind in container:
                    yield from (f"{pod.name}: {kind} {problem}" for problem in _problems(pod, container, kind))
                elif kind != "startupProbe":
                    yield f"{pod.name}: {container['name']} has no {kind}"
        yield from _grace(overlay, pod)


def _problems(pod: Pod, container: Object, kind: str) -> Iterator[str]:
    probe = container[kind]
    ways = [way for way in ("grpc", "tcpSocket", "httpGet", "exec") if way in probe]
    if len(ways) != 1:
        yield f"has {ways or 'no way'}: one way to ask is needed"
        return
    if ways == ["exec"]:
        return  # parsed as a command
    port = probe[ways[0]]["port"]
    if port not in pod.ports():
        yield f"asks port {port}, which is none of the pod's"
    if ways == ["grpc"]:
        service = probe["grpc"].get("service", "")
        if service not in Health().conditions:
            yield f"asks the health service {service!r}, and there are {sorted(Health().conditions)}"
        if any(word.startswith(TLS_FLAG) for word in container.get("args", ())):
            yield "is Kubernetes' own gRPC probe, which speaks no TLS: ask with `llama4-dist health`"


def _grace(overlay: Overlay, pod: Pod) -> Iterator[str]:
    if pod.component not in ("gateway", "driver"):
        return
    (container,) = pod.spec["containers"]
    settings = settings_of(overlay, pod, container)
    assert settings is not None, "gateway and driver serve"
    if "startupProbe" in container:
        probe = container["startupProbe"]
        waited_s = probe["failureThreshold"] * probe["periodSeconds"]
        needed_s = settings.start_timeout_s + settings.placement_timeout_s
        needed_s = settings.directory_timeout_s if pod.component == "gateway" else needed_s
        if waited_s < needed_s:
            yield f"{pod.name}: startupProbe gives up after {waited_s} s and the start may take {needed_s:g} s"
    if pod.component == "gateway":
        stop_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed_s = stop_s + settings.drain_timeout_s
        if (grace_s := pod.spec.get("terminationGracePeriodSeconds", 30)) <= needed_s:
            yield f"{pod.name}: terminationGracePeriodSeconds {grace_s} cuts streams that drain for {needed_s:g} s"
        if settings.drain_timeout_s < settings.max_request_s:
            yield f"{pod.name}: drain_timeout_s {settings.drain_timeout_s:g} is below max_request_s"
        if not stop_s:
            yield f"{pod.name}: no preStop: calls still arrive when it begins to refuse them"
