"""Every command in the operators' pages exists, with its flags; files, units and Secrets they name are there."""

import re
import shlex
from pathlib import Path

import pytest

from tests.deploy.conftest import ROOT
from tools.manifests.commands import parse
from tools.manifests.references import operators_secrets

GUIDE = ROOT / "docs" / "operations.md"
PAGES = [GUIDE, ROOT / "deploy" / "kubernetes" / "README.md", ROOT / "deploy" / "bare-metal" / "README.md"]
KUBECTL = {"apply", "create", "delete", "describe", "drain", "get", "kustomize", "logs", "port-forward", "rollout"}


def lines() -> list[str]:
    """Return every command of the guide's blocks, and those that stand in its tables and sentences."""
    text = GUIDE.read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    inline = re.findall(r"`((?:llama4-dist|kubectl|make) [^`]+)`", re.sub(r"```sh\n.*?```", "", text, flags=re.DOTALL))
    return [line for line in (*blocks, *inline) if line.strip()]


def words_of(line: str) -> list[list[str]]:
    """Split a line into its commands, without variables set before them."""
    plain = re.sub(r"\$\([^)]*\)", "x", line)
    parts = [shlex.split(part) for part in re.split(r"\s\|\s|\s&&\s", plain)]
    return [[word for word in part if not re.fullmatch(r"[A-Z_0-9]+=\S*", word)] for part in parts]


def problem(words: list[str]) -> str:
    program, *arguments = words
    match program:
        case "llama4-dist":
            return "" if arguments in (["serve"], ["gateway"]) else parse(words)
        case "kubectl":
            verbs = [word for word in arguments if word in KUBECTL]
            missing = [path for path in arguments if path.startswith("deploy/") and not (ROOT / path).exists()]
            return "" if (verbs and not missing) or ("/" not in " ".join(arguments) and verbs) else f"{words}"
        case "make":
            return "" if re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE) else f"{words}"
        case "systemctl":
            return "" if (ROOT / "deploy" / "bare-metal" / arguments[-1]).exists() else f"{words}"
        case "docker":
            return "" if (ROOT / arguments[arguments.index("-f") + 1]).exists() else f"{words}"
    return f"{program} is no program of ours or an operator's"


@pytest.mark.parametrize("line", lines())
def test_a_command_of_the_guide_exists(line: str) -> None:
    assert [problem(words) for words in words_of(line) if problem(words)] == []


def test_the_guide_has_commands_at_all() -> None:
    assert len(lines()) > 40


@pytest.mark.parametrize(
    "line",
    [
        "llama4-dist cluster scale --hosts 3",
        "llama4-dist clutser status",
        "kubectl aply -k deploy/kubernetes/overlays/scout-h100",
        "kubectl apply -k deploy/kubernetes/overlays/none",
        "make deploy-chek",
        "systemctl start llama4-drivr.service",
        "vllm serve",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    assert any(problem(words) for words in words_of(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_secret_of_the_readme_is_made_in_the_guide_or_by_a_component() -> None:
    made = set(re.findall(r"create secret generic (\S+)", GUIDE.read_text()))
    assert set(operators_secrets()) - made == {"llama4-tls"}, "a certificate is cert-manager's, or made by hand"
