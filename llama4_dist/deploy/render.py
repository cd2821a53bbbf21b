"""Writes the generated part of an overlay from its plan, and says where what lies there is another plan's."""

import difflib
from collections.abc import Mapping
from pathlib import Path

import yaml

from llama4_dist.deploy.overlay_file import OverlaySettings, read_overlay
from llama4_dist.deploy.patches import budget_patch, cluster_patch, driver_patch, gateway_patch
from llama4_dist.deploy.plan_file import DeployPlan, read_plan
from llama4_dist.deploy.pods import attention_group, expert_group
from llama4_dist.deploy.serve_files import driver_settings, gateway_settings
from llama4_dist.errors import ConfigError

PLAN, SETTINGS, GENERATED = "plan.json", "deploy.yaml", "generated"
HEADER = "# Written by `llama4-dist deploy render`; change plan.json or deploy.yaml and run it again.\n"
SYNTHETIC = "# This model's geometry is synthetic: it was never published; no weights of it exist. For load tests.\n"


def rendered(plan: DeployPlan, settings: OverlaySettings) -> Mapping[str, str]:
    """Return the text of every generated file by its name."""
    attention, experts = attention_group(plan, settings), expert_group(plan, settings)
    values: Mapping[str, object] = {
        "serve.yaml": driver_settings(plan, settings),
        "gateway.yaml": gateway_settings(plan, settings),
        "raycluster-patch.yaml": cluster_patch(plan, settings),
        "driver-patch.yaml": driver_patch(settings),
        "gateway-patch.yaml": gateway_patch(settings),
        "attention-budget-patch.yaml": budget_patch(attention),
        "experts-budget-patch.yaml": budget_patch(experts),
    }
    header = HEADER + (SYNTHETIC if plan.synthetic else "")
    return {name: f"{header}---\n{_yaml(value)}" for name, value in values.items()}


def render(overlay: Path, plan_file: Path | None = None) -> list[Path]:
    """Write the overlay's generated files, and `plan_file` as its plan; return what changed."""
    plan, settings = read_plan(plan_file or overlay / PLAN), read_overlay(overlay / SETTINGS)
    texts = {overlay / GENERATED / name: text for name, text in rendered(plan, settings).items()}
    if plan_file is not None and plan_file.resolve() != (overlay / PLAN).resolve():
        texts[overlay / PLAN] = plan_file.read_text(encoding="utf-8")
    changed = [file for file, text in texts.items() if _read(file) != text]
    (overlay / GENERATED).mkdir(exist_ok=True)
    for file in changed:
        temporary = file.with_suffix(".new")
        temporary.write_text(texts[file], encoding="utf-8")
        temporary.replace(file)
    return changed


def stale(overlay: Path, plan_file: Path | None = None) -> str:
    """Return the difference between what lies there and what the plan says; empty where there is none."""
    plan, settings = read_plan(plan_file or overlay / PLAN), read_overlay(overlay / SETTINGS)
    texts = {overlay / GENERATED / name: text for name, text in rendered(plan, settings).items()}
    strangers = {file: "" for file in sorted((overlay / GENERATED).glob("*")) if file not in texts}
    differences = (_difference(file, _read(file), text) for file, text in {**texts, **strangers}.items())
    return "".join(differences)


def _difference(file: Path, old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), str(file), "by the plan")
    return "".join(lines)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=120)
