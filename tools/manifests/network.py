"""Evaluates the NetworkPolicies: what has to talk can, and nothing else. Knows how Kubernetes adds policies up."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tools.manifests.objects import Object, Overlay, selects

NAME = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"
HERE = {"kubernetes.io/metadata.name": "llama4"}
EPHEMERAL = (32768, 60999)  # Linux's own range, where engines and links listen


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A pod somewhere; `labels` None stands for an address outside the cluster."""

    name: str
    labels: Mapping[str, str] | None
    namespace: Mapping[str, str]


def ours(component: str, **more: str) -> Peer:
    """Describe a pod of the deployment."""
    ray = {"llama4-dist/ray": "true"} if component in ("head", "driver", "attention", "expert") else {}
    return Peer(name=component, labels={NAME: "llama4-dist", COMPONENT: component, **ray}, namespace=HERE)


CLIENT = Peer(name="client", labels={"llama4-dist/client": "true"}, namespace={"kubernetes.io/metadata.name": "apps"})
OPERATOR = Peer(name="operator", labels={"llama4-dist/operator": "true"}, namespace=HERE)
STRANGER = Peer(name="stranger", labels={"app": "other"}, namespace=HERE)
OUTSIDE = Peer(name="outside", labels=None, namespace={})
DNS = Peer(name="dns", labels={"k8s-app": "kube-dns"}, namespace={"kubernetes.io/metadata.name": "kube-system"})
PROMETHEUS = Peer(name="prometheus", labels={"app": "p"}, namespace={"kubernetes.io/metadata.name": "monitoring"})
RAY = ("head", "driver", "attention", "expert")
Flow = tuple[Peer, Peer, int]


def needed(overlay: Overlay) -> Iterator[Flow]:
    """Yield what the processes use."""
    yield CLIENT, ours("gateway"), 50051
    yield OPERATOR, ours("driver"), 50052
    yield ours("gateway"), ours("driver"), 50053
    for port in EPHEMERAL:
        yield ours("gateway"), ours("attention"), port
        yield ours("attention"), ours("expert"), port
        yield ours("attention"), ours("attention"), port
    for one in ("driver", "attention", "expert"):
        yield ours(one), ours("head"), 6379
        yield ours("head"), ours(one), 6380
        yield ours("driver"), ours(one), EPHEMERAL[0]
    yield ours("head"), OUTSIDE, 443
    for one in (*RAY, "gateway"):
        yield ours(one), DNS, 53
    if overlay.of("Job"):
        yield ours("fetch"), OUTSIDE, 443
    if overlay.of("ServiceMonitor"):
        yield PROMETHEUS, ours("gateway"), 9100
        yield PROMETHEUS, ours("expert"), 8080


def forbidden() -> Iterator[Flow]:
    """Yield what nobody shall reach."""
    for port in (50051, 50052, 50053, 6379, 8265, 10001, 8080, 9100, *EPHEMERAL):
        for one in (*RAY, "gateway"):
            yield STRANGER, ours(one), port
            yield OUTSIDE, ours(one), port
        for one in RAY:
            yield CLIENT, ours(one), port
    for port in (50051, 50053, 6379):
        yield OPERATOR, ours("driver"), port
    for port in (6379, 8265, *EPHEMERAL):
        yield ours("gateway"), ours("head"), port
        yield ours("gateway"), ours("expert"), port
    yield ours("gateway"), ours("driver"), 50052
    for one in ("driver", "attention", "expert", "gateway"):
        yield ours(one), OUTSIDE, 443
    yield PROMETHEUS, ours("driver"), 50052
    yield PROMETHEUS, ours("head"), 6379


def check_network(overlay: Overlay) -> Iterator[str]:
    """Yield flows that are needed and blocked, or open and not needed."""
    policies = overlay.of("NetworkPolicy")
    for one in policies:
        if not any(selects(one["spec"]["podSelector"], pod.labels) for pod in overlay.pods()):
            yield f"NetworkPolicy/{one['metadata']['name']}: chooses no pod"
    for source, target, port in needed(overlay):
        if not allowed(policies, source, target, port):
            yield f"{source.name} cannot reach {target.name}:{port}, and has to"
    for source, target, port in forbidden():
        if allowed(policies, source, target, port):
            yield f"{source.name} can reach {target.name}:{port}, and shall not"


def allowed(policies: list[Object], source: Peer, target: Peer, port: int) -> bool:
    """Tell whether a connection passes both ends' policies; a pod that no policy chooses takes and sends all."""
    return _passes(policies, "Ingress", at=target, other=source, port=port) and _passes(
        policies, "Egress", at=source, other=target, port=port
    )


def _passes(policies: list[Object], direction: str, *, at: Peer, other: Peer, port: int) -> bool:
    if at.labels is None or at.namespace != HERE:
        return True
    chosen = [
        p["spec"]
        for p in policies
        if direction in p["spec"]["policyTypes"] and selects(p["spec"]["podSelector"], at.labels)
    ]
    field, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    if not chosen:
        return True
    rules = [rule for spec in chosen for rule in spec.get(field, ())]
    return any(_port_fits(rule, port) and _peer_fits(rule.get(peers), other) for rule in rules)


def _port_fits(rule: Mapping[str, Any], port: int) -> bool:
    ports = rule.get("ports")
    return not ports or any(one["port"] <= port <= one.get("endPort", one["port"]) for one in ports)


def _peer_fits(peers: list[Mapping[str, Any]] | None, other: Peer) -> bool:
    if not peers:
        return True
    return other.labels is not None and any(_chooses(peer, other) for peer in peers)


def _chooses(peer: Mapping[str, Any], other: Peer) -> bool:
    in_namespace = (
        selects(peer["namespaceSelector"], other.namespace) if "namespaceSelector" in peer else other.namespace == HERE
    )
    assert other.labels is not None, "an address outside is chosen by no selector"
    return in_namespace and selects(peer.get("podSelector"), other.labels)
