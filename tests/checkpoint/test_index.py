import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama4_dist.checkpoint.directory import read_exactly
from llama4_dist.checkpoint.index import INDEX, read_index
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import CheckpointError
from tests.checkpoint.shards import edit_header, safetensors_bytes
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.timeout(10)  # a damaged checkpoint must be refused within that

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "scout", num_hidden_layers=1)


def edit_index(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((path / INDEX).read_text())
    edit(content)
    (path / INDEX).write_text(json.dumps(content))


def refused(path: Path, *, file: str, cause: str, tensor: str = "") -> None:
    with pytest.raises(CheckpointError, match=cause) as caught:
        Checkpoint.open(path)
    assert (caught.value.file, caught.value.tensor) == (file, tensor)
    assert file in caught.value.message
    assert tensor in caught.value.message
    assert "\n" not in caught.value.message


def test_one_file_and_many_hold_the_same_tensors(tmp_path: Path) -> None:
    shapes = []
    for num_shards in (1, 2, 5):
        index = read_index(make_checkpoint(tmp_path / str(num_shards), "scout", num_shards=num_shards))
        assert len(index.shards) == num_shards
        shapes.append({name: entry.shape for name, entry in index.entries.items()})
    assert shapes[0] == shapes[1] == shapes[2]


def test_c01_a_missing_shard_is_named(path: Path) -> None:
    (path / SECOND).unlink()
    refused(path, file=SECOND, cause="missing")


def test_c01_a_directory_without_weights_is_named(path: Path) -> None:
    for name in (INDEX, FIRST, SECOND):
        (path / name).unlink()
    refused(path, file=str(path), cause="holds neither")


def test_c01_a_missing_directory_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", file=str(tmp_path / "nowhere"), cause="No such file")


def test_c02_an_index_that_names_an_absent_file_is_refused(path: Path) -> None:
    edit_index(path, lambda index: index["weight_map"].update({"model.norm.weight": "other.safetensors"}))
    refused(path, file="other.safetensors", cause="missing")


def test_c02_an_index_that_names_the_wrong_shard_is_refused(path: Path) -> None:
    edit_index(path, lambda index: index["weight_map"].update({"model.norm.weight": FIRST}))
    refused(path, file=FIRST, cause="does not hold it", tensor="model.norm.weight")


def test_c03_an_index_that_lists_a_tensor_twice_is_refused(path: Path) -> None:
    raw = (path / INDEX).read_text()
    (path / INDEX).write_text(raw.replace('"weight_map": {', f'"weight_map": {{"model.norm.weight": "{FIRST}",'))
    refused(path, file=INDEX, cause="appears twice")


def test_c03_a_tensor_in_two_shards_is_refused(path: Path) -> None:
    header = {"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}
    (path / "z.safetensors").write_bytes(safetensors_bytes(header, bytes(256)))
    edit_index(path, lambda index: index["weight_map"].update({"extra": "z.safetensors"}))
    refused(path, file="z.safetensors", cause="second time", tensor="model.norm.weight")


def test_c04_unknown_tensors_are_reported_and_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def rename(header: dict[str, Any]) -> None:
        header["model.surprise"] = {"dtype": "I64", "shape": [1], "data_offsets": [length, length + 8]}

    length = (path / SECOND).stat().st_size
    length -= 8 + int.from_bytes((path / SECOND).read_bytes()[:8], "little")
    with (path / SECOND).open("ab") as file:
        file.write(bytes(8))
    edit_header(path / SECOND, rename)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.unused == ("model.surprise",)
    assert "model.surprise" in caplog.text


def test_a_required_tensor_that_only_the_shard_knows_is_missing(path: Path) -> None:
    edit_index(path, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(path, file=INDEX, cause="missing", tensor="model.norm.weight")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_an_index_without_a_weight_map_is_refused(path: Path, weight_map: object) -> None:
    edit_index(path, lambda index: index.update(weight_map=weight_map))
    refused(path, file=INDEX, cause="no weight_map")


def test_an_index_beside_a_single_file_is_refused(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / FIRST).read_bytes())
    refused(path, file=INDEX, cause="remove the one")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "a.pt", "a.ckpt", "a.PT2"])
def test_c16_a_pickle_instead_of_safetensors_is_named_and_never_opened(path: Path, name: str) -> None:
    for shard in (INDEX, FIRST, SECOND):
        (path / shard).unlink()
    os.mkfifo(path / name)  # opening it would block
    refused(path, file=name, cause="pickle")


def test_c16_a_pickle_beside_an_incomplete_set_does_not_stand_in(path: Path) -> None:
    (path / SECOND).unlink()
    os.mkfifo(path / "model-00002-of-00002.bin")
    refused(path, file=SECOND, cause="model-00002-of-00002.bin is no substitute")


def test_c16_a_pickle_beside_a_complete_set_is_reported(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(path / "training_args.bin")
    Checkpoint.open(path).close()
    assert "training_args.bin" in caplog.text


@pytest.mark.parametrize("name", ["modeling_llama4.py", "__init__.py", "conftest.py", "libx.so"])
def test_code_beside_the_weights_is_never_opened(path: Path, name: str) -> None:
    os.mkfifo(path / name)  # opening it would block, or be refused as a pipe
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    assert checkpoint.tensor("model.norm.weight").shape == (64,)


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "model.safetensors.pkl", 3])
def test_c16_an_index_may_only_name_safetensors(path: Path, name: object) -> None:
    edit_index(path, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refused(path, file=INDEX, cause="no safetensors", tensor="model.norm.weight")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../x.safetensors", "a\\x.safetensors"])
def test_c17_an_index_may_not_leave_the_directory(path: Path, name: str) -> None:
    (path.parent / "x.safetensors").write_bytes((path / FIRST).read_bytes())
    (path / "a").mkdir()
    edit_index(path, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refused(path, file=INDEX, cause="no plain file name", tensor="model.norm.weight")


@pytest.mark.parametrize("name", [FIRST, "config.json", "generation_config.json", INDEX])
def test_c17_a_link_out_of_the_directory_is_refused(path: Path, name: str) -> None:
    outside = path.parent / "outside"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    refused(path, file=name, cause="outside")


def test_c17_a_link_inside_the_directory_is_followed(path: Path) -> None:
    (path / FIRST).rename(path / "renamed")
    (path / FIRST).symlink_to("renamed")
    Checkpoint.open(path).close()


def test_the_hugging_face_cache_layout_is_followed(path: Path) -> None:
    repository = path.parent / "models--meta-llama--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(path.iterdir()):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    Checkpoint.open(snapshot).tensor("model.norm.weight")


def test_a_link_loop_is_refused(path: Path) -> None:
    (path / FIRST).unlink()
    (path / FIRST).symlink_to(FIRST)
    refused(path, file=FIRST, cause="cannot be opened")


@pytest.mark.parametrize("name", [FIRST, "config.json", INDEX])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_c18_a_pipe_or_directory_in_a_files_place_is_refused_at_once(
    path: Path, name: str, make: Callable[[Path], None]
) -> None:
    (path / name).unlink()
    make(path / name)
    refused(path, file=name, cause="no regular file")


@pytest.mark.parametrize("name", [FIRST, "config.json", INDEX])
def test_c23_an_unreadable_file_is_named(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def deny(target: Any, *rest: Any) -> int:
        if Path(target).name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real_open(target, *rest)

    monkeypatch.setattr(os, "open", deny)  # file modes do not stop a test that runs as root
    refused(path, file=name, cause="Permission denied")


def test_c23_a_file_that_fails_while_reading_is_named(path: Path) -> None:
    class BrokenFile:
        def read(self, num_bytes: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        read_exactly(BrokenFile(), 8, FIRST)  # type: ignore[arg-type]
    assert caught.value.file == FIRST


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_an_oversized_json_file_is_refused_unread(path: Path, name: str) -> None:
    os.truncate(path / name, 10**12)
    refused(path, file=name, cause="at most")
