"""The image as far as it can be judged without building it: lint, sources, pins, and what its driver script does."""

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.deploy.conftest import ROOT

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
DRIVER = ROOT / "deploy" / "docker" / "llama4-driver"
BIN = Path(sys.executable).parent


def instructions(name: str) -> list[str]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return [line.removeprefix(name).strip() for line in text.splitlines() if line.startswith(name + " ")]


@pytest.mark.parametrize("command", [["hadolint", str(DOCKERFILE)], ["shellcheck", str(DRIVER)]])
def test_linters_have_nothing_to_say(command: list[str]) -> None:
    ran = subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout


def copied() -> list[str]:
    found = []
    for line in instructions("COPY"):
        if "--from=" not in line:
            *sources, _ = [word for word in line.split() if not word.startswith("--")]
            found += sources
    return found


def test_everything_that_is_copied_is_there_and_sent_to_the_build() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) or source.startswith(pattern + "/") for pattern in sent), source


def test_nothing_is_sent_that_is_not_copied() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all(any(source == one or source.startswith(one) for source in copied()) for one in sent)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(extra: str) -> set[str]:
    """Return the names that an extra asks for, its own extras followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    for line in project["optional-dependencies"][extra]:
        name, inner = re.match(r"([A-Za-z0-9_.-]+)(?:\[([a-z,]+)\])?", line).groups()  # type: ignore[union-attr]
        if normal(name) == "llama4-dist":
            for one in inner.split(","):
                found |= requirements(one)
        else:
            found.add(normal(name))
    return found | {normal(re.match(r"[A-Za-z0-9_.-]+", line)[0]) for line in project["dependencies"]}  # type: ignore[index]


def test_every_package_of_the_image_is_pinned() -> None:
    pins = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if line}
    (extras,) = set(re.findall(r'"\.\[([a-z,]+)\]"', DOCKERFILE.read_text()))
    wanted = set().union(*(requirements(extra) for extra in extras.split(",")))
    assert {"ray", "torch", "huggingface-hub", "triton"} <= wanted
    assert wanted <= pins
    installs = re.findall(r"pip install .*", re.sub(r"\\\n", " ", DOCKERFILE.read_text()))
    assert all("--constraint constraints.txt" in line or "--no-deps" in line for line in installs)


def test_the_image_runs_as_the_user_of_the_manifests() -> None:
    (user,) = instructions("USER")
    base = (ROOT / "deploy" / "kubernetes" / "base" / "gateway.yaml").read_text()
    spec = next(iter(yaml.safe_load_all(base)))["spec"]["template"]["spec"]
    context = spec["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert instructions("ENTRYPOINT") == ['["/usr/bin/tini", "--"]']


def test_the_version_of_ray_is_the_manifests_own() -> None:
    (pin,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"rayVersion: {pin}" in (ROOT / "deploy" / "kubernetes" / "base" / "raycluster.yaml").read_text()


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Programs that write down how they were called; Ray answers at the third time."""
    ray = 'echo "ray $*" >> "$CALLS"; [ "$1" = start ] || [ "$(grep -c health-check "$CALLS")" -ge "$AFTER" ]\n'
    for name, text in (("ray", ray), ("llama4-dist", 'echo "llama4-dist $*" >> "$CALLS"\n'), ("sleep", "exit 0\n")):
        (tmp_path / name).write_text("#!/bin/sh\n" + text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def drive(programs: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    calls = programs / "calls"
    clean = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}
    ran = subprocess.run([str(DRIVER), *arguments], env=clean | environment, capture_output=True, timeout=30)
    return ran.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_the_driver_waits_for_ray_joins_it_and_becomes_the_server(programs: Path) -> None:
    code, calls = drive(programs, "--config", "a b", RAY_ADDRESS="head:6379", AFTER="3")
    assert code == 0
    assert calls[:3] == ["ray health-check --address head:6379"] * 3
    assert calls[3].startswith("ray start --address=head:6379 --num-cpus=0 --num-gpus=0")
    assert calls[4:] == ["llama4-dist serve --config a b"]


def test_the_driver_gives_up_on_a_ray_that_does_not_come(programs: Path) -> None:
    code, calls = drive(programs, RAY_ADDRESS="head:6379", AFTER="99", RAY_WAIT_S="0")
    assert code == 4
    assert not any(call.startswith(("ray start", "llama4-dist")) for call in calls)


def test_the_driver_needs_to_know_where_ray_is(programs: Path) -> None:
    code, calls = drive(programs, AFTER="1")
    assert code != 0
    assert calls == []
