"""The public API as a contract: its stubs are those of its protos, it lints, and no message can nest without bound."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import Descriptor

from llama4_dist.v1 import cluster_pb2, experts_pb2, inference_pb2, tokenizer_pb2, types_pb2

ROOT = Path(__file__).resolve().parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_stubs", ROOT / "tools" / "generate_stubs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_stubs_are_what_the_protos_generate() -> None:
    assert generator().drift() == []


def test_a_stale_stub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = generator()
    tool.generate(tmp_path)
    stale = tmp_path / "llama4_dist" / "v1" / "types_pb2.py"
    stale.write_bytes(stale.read_bytes() + b"#")
    (tmp_path / "llama4_dist" / "v1" / "gone_pb2.py").write_bytes(b"")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.drift() == ["llama4_dist/v1/gone_pb2.py", "llama4_dist/v1/types_pb2.py"]


def test_the_protos_lint_and_are_formatted(tmp_path: Path) -> None:
    buf, image = Path(sys.executable).with_name("buf"), tmp_path / "protos.binpb"
    generator().write_image(image)
    lint = ["lint", str(image), "--path", "llama4_dist"]
    for arguments in (lint, ["format", "--diff", "--exit-code", "--path", "protos/llama4_dist/v1"]):
        done = subprocess.run([buf, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def depth(message: Descriptor, path: tuple[str, ...] = ()) -> int:
    """Longest nesting below a message; fails on a type that contains itself, and on Any and Struct."""
    assert message.full_name not in path, f"{message.full_name} contains itself"
    assert message.full_name not in ("google.protobuf.Any", "google.protobuf.Struct", "google.protobuf.Value")
    inner = [depth(field.message_type, (*path, message.full_name)) for field in message.fields if field.message_type]
    return 1 + max(inner, default=0)


def test_no_message_is_recursive_or_dynamic() -> None:
    for module in (types_pb2, inference_pb2, tokenizer_pb2, experts_pb2):
        for message in module.DESCRIPTOR.message_types_by_name.values():
            assert depth(message) <= 6


def test_what_an_admin_sends_is_not_dynamic_either() -> None:
    requests = [
        message for name, message in cluster_pb2.DESCRIPTOR.message_types_by_name.items() if name.endswith("Request")
    ]
    assert len(requests) == 6
    assert all(depth(message) <= 6 for message in requests)
