"""Every overlay passes every check, and every check goes red on a manifest that is broken in its way."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import NAMES, OVERLAYS, ROOT, built
from tools.manifests import rules
from tools.manifests.commands import parse
from tools.manifests.objects import Object, Overlay, build
from tools.manifests.schemas import check_schemas, read_crds
from tools.validate_manifests import findings, main

Break = Callable[[dict[str, Object]], Any]


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_is_right_in_every_respect(name: str) -> None:
    assert findings(built(name), {}) == []


def container(one: Object) -> Object:
    return one["spec"]["template"]["spec"]["containers"][0]


def group(objects: dict[str, Object], index: int) -> Object:
    return objects["RayCluster/llama4"]["spec"]["workerGroupSpecs"][index]


def worker(objects: dict[str, Object], index: int) -> Object:
    return group(objects, index)["template"]["spec"]["containers"][0]


def without(words: list[str], start: str) -> list[str]:
    return [word for word in words if not word.startswith(start)]


GATEWAY, DRIVER = "Deployment/llama4-gateway", "Deployment/llama4-driver"
BROKEN: dict[str, tuple[str, Break]] = {
    "a field Kubernetes does not know": (
        r"schema.*'replicaz' was unexpected",
        lambda o: o[GATEWAY]["spec"].update(replicaz=3),
    ),
    "a field KubeRay does not know": (
        r"schema.*'minReplica' was unexpected",
        lambda o: group(o, 0).update(minReplica=3),
    ),
    "a field of a pod inside a RayCluster": (
        r"schema.*'volumMounts' was unexpected",
        lambda o: worker(o, 1).update(volumMounts=[]),
    ),
    "an autoscaler of no version": (
        r"schema.*'v3' is not one of",
        lambda o: o["RayCluster/llama4"]["spec"]["autoscalerOptions"].update(version="v3"),
    ),
    "a monitor's field": (
        r"schema.*'prot' was unexpected",
        lambda o: o["PodMonitor/llama4-ray"]["spec"]["podMetricsEndpoints"][0].update(prot=1),
    ),
    "a kind without a schema": (r"schema.*--crd", lambda o: o[GATEWAY].update(apiVersion="apps/v9")),
    "a selector": (
        "does not choose its own pods",
        lambda o: o[GATEWAY]["spec"]["selector"]["matchLabels"].update({"app.kubernetes.io/component": "g"}),
    ),
    "a Service of no pod": (
        "Service/llama4-driver: its selector chooses no pod",
        lambda o: o["Service/llama4-driver"]["spec"]["selector"].update({"app.kubernetes.io/component": "d"}),
    ),
    "a Service's port": (
        "has no port grcp",
        lambda o: o["Service/llama4-gateway"]["spec"]["ports"][0].update(targetPort="grcp"),
    ),
    "a budget of no pod": (
        "PodDisruptionBudget/llama4-experts: its selector chooses no pod",
        lambda o: o["PodDisruptionBudget/llama4-experts"]["spec"]["selector"]["matchLabels"].update(a="b"),
    ),
    "a budget that counts shares of a RayCluster": (
        "no scale subresource",
        lambda o: o["PodDisruptionBudget/llama4-experts"].update(
            spec={"maxUnavailable": 1, "selector": o["PodDisruptionBudget/llama4-experts"]["spec"]["selector"]}
        ),
    ),
    "a monitor's port": (
        "has a port metric",
        lambda o: o["ServiceMonitor/llama4"]["spec"]["endpoints"][0].update(port="metric"),
    ),
    "a Ray pod without the port that is scraped": ("has no port metrics", lambda o: worker(o, 0)["ports"].pop()),
    "a mount of no volume": (
        "mounts modles, which is no volume",
        lambda o: worker(o, 0)["volumeMounts"][2].update(name="modles"),
    ),
    "a Secret nobody makes": (
        "Secret llama4-other is neither defined nor named",
        lambda o: o[GATEWAY]["spec"]["template"]["spec"]["volumes"][3]["secret"].update(secretName="llama4-other"),
    ),
    "a Secret's key": (
        "has no key tokn",
        lambda o: o["Job/llama4-fetch-model"]["spec"]["template"]["spec"]["initContainers"][0]["env"][0]["valueFrom"][
            "secretKeyRef"
        ].update(key="tokn"),
    ),
    "a claim": (
        "PersistentVolumeClaim llama4-models is not defined",
        lambda o: o["PersistentVolumeClaim/llama4-models"]["metadata"].update(name="other"),
    ),
    "a service account": (
        "service account llama4-worker is not defined",
        lambda o: o["ServiceAccount/llama4-worker"]["metadata"].update(name="other"),
    ),
    "Ray's token": (
        "Secret ray is neither",
        lambda o: o["RayCluster/llama4"]["spec"]["authOptions"].update(secretName="ray"),
    ),
    "a probe's port": (
        "asks port 50055",
        lambda o: container(o[GATEWAY])["livenessProbe"]["grpc"].update(port=50055),
    ),
    "a probe's condition": (
        "'readyness'",
        lambda o: container(o[GATEWAY])["readinessProbe"]["grpc"].update(service="readyness"),
    ),
    "no probe": ("ray-worker has no livenessProbe", lambda o: worker(o, 1).pop("livenessProbe")),
    "a gRPC probe of a TLS port": (
        "speaks no TLS",
        lambda o: container(o[GATEWAY])["args"].extend(["--tls-certificate=/c", "--tls-key=/k"]),
    ),
    "a start that takes longer than its probe": (
        "startupProbe gives up after 50 s",
        lambda o: container(o[DRIVER])["startupProbe"].update(failureThreshold=5),
    ),
    "streams that are cut": (
        "cuts streams",
        lambda o: o[GATEWAY]["spec"]["template"]["spec"].update(terminationGracePeriodSeconds=60),
    ),
    "no preStop": ("no preStop", lambda o: container(o[GATEWAY]).pop("lifecycle")),
    "root": (
        "llama4-driver: may run as root",
        lambda o: o[DRIVER]["spec"]["template"]["spec"]["securityContext"].update(runAsNonRoot=False),
    ),
    "no seccomp": (
        "has no seccomp profile",
        lambda o: o[DRIVER]["spec"]["template"]["spec"]["securityContext"].pop("seccompProfile"),
    ),
    "privileges": (
        "may gain privileges",
        lambda o: worker(o, 0)["securityContext"].pop("allowPrivilegeEscalation"),
    ),
    "a capability": (
        "has capabilities",
        lambda o: worker(o, 1)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
    ),
    "a writable image": (
        "may write to its image",
        lambda o: worker(o, 1)["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "no limit": ("no limit of memory", lambda o: container(o[DRIVER])["resources"]["limits"].pop("memory")),
    "a token of the API": (
        "llama4-gateway: gets a token",
        lambda o: o[GATEWAY]["spec"]["template"]["spec"].update(automountServiceAccountToken=True),
    ),
    "the node's network": (
        "shares a namespace of its node",
        lambda o: group(o, 1)["template"]["spec"].update(hostNetwork=True),
    ),
    "the node's files": (
        "mounts a path of its node",
        lambda o: group(o, 1)["template"]["spec"]["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    ),
    "nowhere to write": ("nowhere to write", lambda o: container(o[GATEWAY])["volumeMounts"].pop(0)),
    "two images": ("one image for every role", lambda o: container(o[GATEWAY]).update(image="other:1")),
    "a Secret in the files": (
        "a Secret lies in the manifests",
        lambda o: o.update(new={"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}),
    ),
    "an open gateway": (
        "reachable from other machines: give token_file",
        lambda o: container(o[GATEWAY]).update(args=without(container(o[GATEWAY])["args"], "--token-file")),
    ),
    "open metrics": (
        "give metrics_token_file",
        lambda o: container(o[GATEWAY]).update(args=without(container(o[GATEWAY])["args"], "--metrics-token-file")),
    ),
    "open metrics of the driver": (
        "metrics_address 0.0.0.0:9100 is reachable",
        lambda o: container(o[DRIVER]).update(args=without(container(o[DRIVER])["args"], "--metrics-token-file")),
    ),
    "an open admin port": (
        "0.0.0.0:50052 is reachable",
        lambda o: container(o[DRIVER]).update(args=without(container(o[DRIVER])["args"], "--admin-token-file")),
    ),
    "no way to the directory": (
        "gateway cannot reach driver:50053",
        lambda o: o.pop("NetworkPolicy/llama4-driver"),
    ),
    "no way between workers": ("attention cannot reach expert", lambda o: o.pop("NetworkPolicy/llama4-ray")),
    "no names": ("gateway cannot reach dns:53", lambda o: o.pop("NetworkPolicy/llama4-dns")),
    "no scrape": ("prometheus cannot reach gateway:9100", lambda o: o.pop("NetworkPolicy/llama4-scrape")),
    "an open network": (
        "stranger can reach expert",
        lambda o: o["NetworkPolicy/llama4-ray"]["spec"]["ingress"].append({}),
    ),
    "no default": (
        "expert can reach outside:443",
        lambda o: o["NetworkPolicy/llama4-ray"]["spec"]["egress"].append({}),
    ),
    "a policy of no pod": (
        "NetworkPolicy/llama4-fetch: chooses no pod",
        lambda o: o["NetworkPolicy/llama4-fetch"]["spec"]["podSelector"]["matchLabels"].update(a="b"),
    ),
    "a flag": ("--directry", lambda o: container(o[GATEWAY])["args"].append("--directry=x")),
    "a value of a flag": ("--metrics-address", lambda o: container(o[GATEWAY])["args"].append("--metrics-address")),
    "a command": (
        "gatway",
        lambda o: container(o[GATEWAY])["args"].__setitem__(1, "gatway"),
    ),
    "a program": ("vllm is no program", lambda o: container(o[GATEWAY])["args"].__setitem__(0, "vllm")),
    "a setting": (
        "expertz: no such setting",
        lambda o: settings_map(o)["data"].update(
            {"serve.yaml": settings_map(o)["data"]["serve.yaml"] + "expertz: 1\n"}
        ),
    ),
    "a settings file that is not mounted": (
        "is no key of a ConfigMap",
        lambda o: settings_map(o)["data"].pop("gateway.yaml"),
    ),
    "a variable": (
        "LLAMA4_DIST_EXPERTZ",
        lambda o: container(o[DRIVER])["env"].append({"name": "LLAMA4_DIST_EXPERTZ", "value": "1"}),
    ),
    "a count of hosts": ("expert hosts: 7, and 6 by the plan", lambda o: group(o, 1).update(replicas=7, maxReplicas=7)),
    "a count of groups": ("attention groups: 1, and 2", lambda o: group(o, 0).update(replicas=1, minReplicas=1)),
    "stages": ("pods of an attention group: 2", lambda o: group(o, 0).update(numOfHosts=2)),
    "GPUs": (
        "GPUs of an expert pod: 2, and 1",
        lambda o: worker(o, 1)["resources"]["limits"].update({"nvidia.com/gpu": "2"}),
    ),
    "more GPUs than there are": ("9 GPUs may be asked for", lambda o: group(o, 1).update(maxReplicas=7)),
    "shared memory": (
        "/dev/shm counts as the pod's memory",
        lambda o: group(o, 1)["template"]["spec"]["volumes"][0]["emptyDir"].update(sizeLimit="512Gi"),
    ),
    "hosts served": (
        "expert hosts served: 5, and 6",
        lambda o: settings_map(o)["data"].update(
            {"serve.yaml": re.sub("experts: .*", "experts: 5", settings_map(o)["data"]["serve.yaml"])}
        ),
    ),
}


def strip_policies(objects: dict[str, Object]) -> None:
    for name in [name for name in objects if name.startswith("NetworkPolicy/")]:
        del objects[name]


def settings_map(objects: dict[str, Object]) -> Object:
    (found,) = (one for name, one in objects.items() if name.startswith("ConfigMap/llama4-serve"))
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest_is_found(name: str, overlay: Callable[[str], Overlay]) -> None:
    pattern, damage = BROKEN[name]
    broken = overlay("scout-h100")
    objects = {f"{one['kind']}/{one['metadata']['name']}": one for one in broken.objects}
    damage(objects)
    broken.objects[:] = objects.values()
    found = "\n".join(findings(broken, {}))
    assert re.search(pattern, found), found


def test_a_host_that_needs_more_than_its_pod_has_is_found(overlay: Callable[[str], Overlay]) -> None:
    broken = overlay("local-cpu")
    (cluster,) = broken.of("RayCluster")
    cluster["spec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "8Mi"
    assert any("a pod holds" in finding for finding in findings(broken, {}))


@pytest.mark.parametrize("words", [["llama4-dist", "serve", "--model", "m"], ["hf", "download", "a/b"]])
def test_a_right_command_is_right(words: list[str]) -> None:
    assert parse(words) == ""


def test_a_real_definition_of_a_custom_resource_is_strict(tmp_path: Path) -> None:
    """A definition as operators have them, cut down to what shows each rule."""
    spec = {
        "type": "object",
        "properties": {
            "size": {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]},
            "free": {
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": True,
                "properties": {"a": {"type": "string"}},
            },
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    schema = {
        "type": "object",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
        },
    }
    definition = {
        "kind": "CustomResourceDefinition",
        "spec": {
            "group": "x.io",
            "names": {"kind": "Thing"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}],
        },
    }
    file = tmp_path / "crd.yaml"
    file.write_text(yaml.safe_dump(definition))
    crds = read_crds([file])

    def wrong(**given: Any) -> list[str]:
        thing = {"apiVersion": "x.io/v1", "kind": "Thing", "metadata": {"name": "t"}, "spec": given}
        made = Overlay(folder=tmp_path, objects=[thing], plan=built("local-cpu").plan)
        return list(check_schemas(made, crds))

    assert wrong(size=1, free={"b": 1}, labels={"any": "text"}) == []
    assert wrong(size="1") == []
    assert "'sise' was unexpected" in wrong(sise=1)[0]
    assert wrong(labels={"any": 1})


def test_the_program_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "deploy" / "kubernetes", tmp_path / "kubernetes")
    folder = tmp_path / "kubernetes" / "overlays" / "local-cpu"
    assert main([str(folder), "--json"]) == 0
    capsys.readouterr()
    base = folder.parents[1] / "base" / "gateway.yaml"
    base.write_text(base.read_text().replace("--token-file", "--tokn-file"))
    assert main([str(folder), "--json"]) == 1
    assert "--tokn-file" in json.loads(capsys.readouterr().out)[str(folder)][0]
    base.unlink()
    assert main([str(folder)]) == 1
    assert "gateway.yaml" in capsys.readouterr().out


def test_manifests_are_clean_yaml() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "-c", ".yamllint.yaml", "deploy", "tools/manifests"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout


def test_an_overlay_that_says_nothing_of_the_plan_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path)
    assert OVERLAYS.is_dir()


def test_rules_that_differ_from_the_documented_alarms_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: Callable[[str], Overlay]
) -> None:
    alerts, written = tmp_path / "alerts.yaml", tmp_path / "rules.yaml"
    alerts.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [{"alert": "A", "expr": "up == 0"}]}]}))
    monkeypatch.setattr(rules, "ALERTS", alerts)
    made = overlay("scout-h100")
    assert any("differs from alerts.yaml" in finding for finding in findings(made, {}))
    rules.write(alerts, written)
    (one,) = made.of("PrometheusRule")
    one["spec"] = yaml.safe_load(written.read_text())["spec"]
    assert findings(made, {}) == []
