"""Validates every object against a strict schema: Kubernetes' own, ours of the custom resources, or real CRDs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource

from tools.manifests.objects import Object, Overlay, identity

VERSION = "1.37"
CUSTOM = {
    ("ray.io/v1", "RayCluster"): "raycluster.yaml",
    ("monitoring.coreos.com/v1", "PodMonitor"): "monitoring.yaml",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "monitoring.yaml",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "monitoring.yaml",
}
Crds = Mapping[tuple[str, str], Mapping[str, Any]]


def check_schemas(overlay: Overlay, crds: Crds | None = None) -> Iterator[str]:
    """Yield what a schema refuses."""
    for one in overlay.objects:
        yield from (f"{identity(one)}: {problem}" for problem in problems(one, crds or {}))


def problems(one: Object, crds: Crds) -> Iterator[str]:
    """Yield what is wrong with one object."""
    key = (one.get("apiVersion", ""), one.get("kind", ""))
    if key in crds:
        yield from _errors(jsonschema.Draft202012Validator(crds[key]), one)
    else:
        yield from _known_problems(json.dumps(one, sort_keys=True))


@cache  # overlays share most of their objects, and reading Kubernetes' definitions takes longest
def _known_problems(text: str) -> tuple[str, ...]:
    one = json.loads(text)
    key = (one.get("apiVersion", ""), one.get("kind", ""))
    if key in CUSTOM:
        return tuple(_errors(_validator(CUSTOM[key]), one))
    try:
        kubernetes_validate.validate(one, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(map(str, error.path))}: {error.message[:300]}",)
    except kubernetes_validate.SchemaNotFoundError as error:
        return (f"{error.message}; give its CRD with --crd",)
    return ()


def read_crds(paths: Sequence[Path]) -> Crds:
    """Read CustomResourceDefinitions and make them refuse what they do not name."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for path in paths:
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if not document or document.get("kind") != "CustomResourceDefinition":
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                found[key] = strict(version["schema"]["openAPIV3Schema"])
    return found


def strict(schema: Any) -> Any:
    """Return a structural schema that refuses unknown fields; `metadata` of the object itself stays as it is."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key not in ("properties", "pattern", "format")}
    if "properties" in schema:
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made = {"type": ["integer", "string"]}
    return made


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    schema = yaml.safe_load((Path(__file__).parent / "custom_resources" / name).read_text(encoding="utf-8"))
    folder = files("kubernetes_validate").joinpath("kubernetes-json-schema").joinpath(f"v{VERSION}.0-local-strict")
    definitions = json.loads(folder.joinpath("_definitions.json").read_text(encoding="utf-8"))
    registry = Registry().with_resource("_definitions.json", Resource.from_contents(definitions))
    return jsonschema.Draft202012Validator(schema, registry=registry)


def _errors(validator: jsonschema.Draft202012Validator, one: Object) -> Iterator[str]:
    for error in validator.iter_errors(one):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
