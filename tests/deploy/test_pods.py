"""The manifests' own commands, run as their pods would: not root, read-only, Secrets of mode 0440, the very ports."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.conftest import ROOT, built
from tools.manifests.commands import expand
from tools.manifests.objects import Object, pods_of

ADDRESS = "10.9.9.9"
NAMESPACE = [*("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")]
TOKEN = "0123456789abcdef" * 3
SAYS = "The sea"


def arguments_of(deployment: str) -> list[str]:
    """Return a Deployment's command as it is run here: one address, settings and Secrets under /mnt."""
    (one,) = (one for one in built("local-cpu").of("Deployment") if one["metadata"]["name"] == deployment)
    (pod,) = pods_of(one)
    container = pod.spec["containers"][0]
    words = [expand(word, container).replace("10.0.0.1", ADDRESS) for word in container["args"]]
    words = [word.replace("/etc/llama4/", "/mnt/") for word in words]
    return [re.sub(r"llama4-driver:|llama4-head-svc:", f"{ADDRESS}:", word) for word in words]


def ray_start(group: Object, **more: str) -> list[str]:
    """Return what KubeRay makes of a group's start parameters."""
    offered = dict(group.get("resources", {}))
    parameters = dict(group["rayStartParams"]) | {"num-cpus": offered.pop("CPU", "0")} | more
    if offered:
        parameters["resources"] = json.dumps({name: float(value) for name, value in offered.items()})
    return ["ray", "start", *(f"--{name}={value}" for name, value in parameters.items())]


def agent(number: int) -> dict[str, str]:
    return {"dashboard-agent-listen-port": str(52370 + number), "metrics-export-port": str(8090 + number)}


def script() -> str:
    """Return a shell script that is the whole cluster."""
    (cluster,) = built("local-cpu").of("RayCluster")
    attention, experts = cluster["spec"]["workerGroupSpecs"]
    # All raylets share one address here, so each has ports of its own; one offers what all three expert pods do.
    many = experts | {"resources": {"CPU": "3", "llama4_expert": "3"}}
    head = ray_start(cluster["spec"]["headGroupSpec"], **{"include-dashboard": "false", **agent(0)})
    join = {"address": f"{ADDRESS}:6379"}
    nodes = [
        ray_start(attention, **join, **agent(1)),
        ray_start(many, **join, **agent(2), **{"node-manager-port": "6381"}),
    ]
    driver = [str(ROOT / "deploy" / "docker" / "llama4-driver"), *arguments_of("llama4-driver")[1:]]
    driver = [word.replace(":9100", ":9101") for word in driver]
    steps = [
        shlex.join([*head, "--head"]),
        f"{shlex.join(driver)} > /tmp/driver.log 2>&1 & driver=$!",
        f"{shlex.join(arguments_of('llama4-gateway'))} > /tmp/gateway.log 2>&1 & gateway=$!",
        *map(shlex.join, nodes),
        "llama4-dist health --server 127.0.0.1:50051 --wait 150s || cat /tmp/driver.log /tmp/gateway.log",
        "llama4-dist health --server 127.0.0.1:50052 --condition startup",
        f"LLAMA4_DIST_TOKEN=a-token-of-clients-0123 llama4-dist generate --server 127.0.0.1:50051 '{SAYS}'"
        " --max-tokens 8 --temperature 0 --json",
        "LLAMA4_DIST_TOKEN=a-token-of-operators-0123 llama4-dist cluster status --server 127.0.0.1:50052 --json",
        "python -c \"import os, urllib.request as r; q = r.Request('http://127.0.0.1:9100/metrics', headers="
        "{'Authorization': 'Bearer a-token-of-scrapers-0123'}); print('page', r.urlopen(q, timeout=5).status)\"",
        "touch /written 2>&1 || true",
        "kill $gateway; wait $gateway; echo gateway ended $?",
        "kill $driver; wait $driver; echo driver ended $?",
    ]
    return "set -u\n" + "\n".join(steps) + "\n"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_manifests_commands_run_as_their_pods_would(tmp_path: Path) -> None:
    if os.geteuid() != 0 or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("namespaces need root")
    run = tmp_path / "run.sh"
    run.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n" + script())
    interpreter = Path(sys.executable).resolve().parents[1]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/tmp",
        "XDG_CACHE_HOME": "/tmp/cache",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": f"{ADDRESS}:6379",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "LLAMA4_DIST_CLUSTER_SECRET_FILE": "/mnt/cluster/secret",
    }
    command = [*NAMESPACE, str(ROOT / "tests" / "deploy" / "pod_namespace.sh"), str(run), str(ROOT), str(interpreter)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380)
    said = ran.stdout
    assert "readiness at 127.0.0.1:50051 is on" in said, said + ran.stderr
    assert "startup at 127.0.0.1:50052 is on" in said, said
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    status = next(answer for answer in answers if "workers" in answer)
    roles = sorted(worker["role"] for worker in status["workers"])
    assert roles == ["attention", "controller", "expert", "expert", "expert"]
    assert any("text" in json.dumps(answer) for answer in answers if answer is not status), said
    assert "page 200" in said
    assert "Read-only file system" in said, "or the check means nothing"
    assert "gateway ended 0" in said
    assert "driver ended 0" in said
