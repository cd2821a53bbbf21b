"""What the source may not contain: unsafe decoding, input checks that vanish, paths of some machine."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "numpy.load",
}
GENERATED = ("llama4_dist/v1/", "llama4_dist/internal/")


def sources() -> list[Path]:
    files = [
        path for folder in ("llama4_dist", "cluster", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    return [path for path in files if not path.relative_to(ROOT).as_posix().startswith(GENERATED)]


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def violations(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS:
            yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_CALLS:
                yield dotted(node.func)
            if any(word.arg == "shell" and getattr(word.value, "value", False) for word in node.keywords):
                yield "shell=True"
            if any(word.arg == "strict_map_key" and not getattr(word.value, "value", True) for word in node.keywords):
                yield "msgpack without strict_map_key"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield "bare except"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_decodes_code_or_hides_errors(path: Path) -> None:
    assert list(violations(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(x)",
        "torch.load(f)",
        "run('x', shell=True)",
        "try: pass\nexcept: pass",
    ],
)
def test_the_gate_itself_sees_what_it_forbids(text: str) -> None:
    assert list(violations(ast.parse(text)))


def test_every_module_opens_with_a_sentence() -> None:
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_no_tracked_text_names_a_path_of_some_machine() -> None:
    listing = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^.[:alnum:]_/])/(root|home|work)/"], cwd=ROOT, capture_output=True, text=True
    )
    found = [line for line in listing.stdout.splitlines() if "test_static_gates" not in line and ":/home/" not in line]
    assert listing.returncode in (0, 1)
    assert found == []


SHAPED = re.compile(r"^_?[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)$")


def legend() -> set[str]:
    text = (ROOT / "docs" / "design.md").read_text().split("## Shape legend")[1].split("##")[0]
    return set(re.findall(r"`([A-Z])`", text))


def shaped_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
        if match := SHAPED.match(name):
            yield name, match[1]


def test_shape_suffixes_use_the_letters_of_the_legend() -> None:
    letters = legend()
    assert {"T", "D", "K", "V"} <= letters
    found = {
        (path.relative_to(ROOT).as_posix(), name, suffix)
        for path in sources()
        for name, suffix in shaped_names(ast.parse(path.read_text()))
    }
    assert len(found) > 100, "the pattern finds no shaped names any more"
    assert {one for one in found if not set(re.sub(r"\d", "", one[2])) <= letters} == set()
