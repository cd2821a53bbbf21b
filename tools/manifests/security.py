"""Checks that pods have no more rights than they use, run one image, and listen to nobody without a credential."""

from collections.abc import Iterator

from cluster.admin.settings import AdminSettings
from llama4_dist.errors import ConfigError
from llama4_dist.gateway.settings import GatewaySettings
from tools.manifests.commands import settings_of
from tools.manifests.objects import Object, Overlay, Pod

MAY_ADD = frozenset({"IPC_LOCK"})  # for RDMA
MAY_HOLD_A_TOKEN = frozenset({"head"})  # Ray's autoscaler
HOST = ("hostNetwork", "hostPID", "hostIPC")


def check_security(overlay: Overlay) -> Iterator[str]:
    """Yield every right too many, and every open door."""
    if overlay.of("Secret"):
        yield "a Secret lies in the manifests: the operator makes Secrets"
    images = {container["image"] for pod in overlay.pods() for container in pod.containers}
    if len(images) != 1:
        yield f"there is one image for every role, and {sorted(images)} are used"
    for pod in overlay.pods():
        yield from (f"{pod.name}: {problem}" for problem in _pod_problems(overlay, pod))
        for container in pod.containers:
            yield from (f"{pod.name}: {container['name']} {problem}" for problem in _container_problems(pod, container))
            yield from (f"{pod.name}: {problem}" for problem in open_doors(overlay, pod, container))


def open_doors(overlay: Overlay, pod: Pod, container: Object) -> Iterator[str]:
    """Let the servers' own settings refuse what others could reach without a credential."""
    try:
        settings = settings_of(overlay, pod, container)
        if settings is None:
            return
        if settings.gateway:
            GatewaySettings(
                address=settings.address,
                token_file=settings.token_file,
                tls_certificate=settings.tls_certificate,
                tls_key=settings.tls_key,
                tls_client_ca=settings.tls_client_ca,
                metrics_address=settings.metrics_address,
                metrics_token_file=settings.metrics_token_file,
            )
        GatewaySettings(metrics_address=settings.metrics_address, metrics_token_file=settings.metrics_token_file)
        if settings.experts:
            AdminSettings(address=settings.admin_address, token_file=settings.admin_token_file)
    except ConfigError as error:
        yield error.message


def _pod_problems(overlay: Overlay, pod: Pod) -> Iterator[str]:
    context = pod.spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or context.get("runAsUser", 0) == 0:
        yield "may run as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    if any(pod.spec.get(name) for name in HOST):
        yield "shares a namespace of its node"
    if any("hostPath" in volume for volume in pod.spec.get("volumes", ())):
        yield "mounts a path of its node"
    accounts = {one["metadata"]["name"]: one for one in overlay.of("ServiceAccount")}
    account = accounts.get(pod.spec.get("serviceAccountName", ""), {})
    mounts = pod.spec.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True))
    if mounts and pod.component not in MAY_HOLD_A_TOKEN:
        yield "gets a token of the Kubernetes API"


def _container_problems(pod: Pod, container: Object) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield "may gain privileges"
    if not context.get("readOnlyRootFilesystem"):
        yield "may write to its image"
    capabilities = context.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", ())) - MAY_ADD:
        yield f"has capabilities {capabilities}"
    resources = container.get("resources", {})
    for name in ("cpu", "memory"):
        if name not in resources.get("requests", {}) or name not in resources.get("limits", {}):
            yield f"has no request or no limit of {name}"
    if "/tmp" not in {mount["mountPath"] for mount in container.get("volumeMounts", ())}:
        yield "has nowhere to write: mount an emptyDir at /tmp"
