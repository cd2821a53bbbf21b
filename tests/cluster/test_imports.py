"""Who may speak to Ray: what carries tokens cannot, because it does not know it."""

import ast
from pathlib import Path

import cluster

RAY_FILES = {"actor_handle.py", "actors.py", "launch.py", "spawn.py"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_the_files_about_processes_know_ray() -> None:
    (folder,) = cluster.__path__
    knowing = {path for path in Path(folder).rglob("*.py") if "ray" in imported(path)}
    assert {path.parent.name for path in knowing} == {"driver"}
    assert {path.name for path in knowing} == RAY_FILES


def test_one_file_makes_actors() -> None:
    (folder,) = cluster.__path__
    making = {path.name for path in Path(folder).rglob("*.py") if "ray.remote" in path.read_text()}
    assert making == {"actors.py"}
