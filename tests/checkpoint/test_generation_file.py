import json
from pathlib import Path

import pytest

from llama4_dist.checkpoint.generation_file import GENERATION_CONFIG, GenerationDefaults
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import CheckpointError
from tests.checkpoints import make_checkpoint


def open_with(path: Path, content: object) -> GenerationDefaults:
    make_checkpoint(path, "dense")
    (path / GENERATION_CONFIG).write_text(json.dumps(content))
    return Checkpoint.open(path).generation


def test_published_defaults_are_read(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "scout")
    assert Checkpoint.open(path).generation == GenerationDefaults(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_ids=(257, 263, 264)
    )


def test_what_the_file_leaves_out_stays_unstated(tmp_path: Path) -> None:
    assert open_with(tmp_path, {"temperature": 0}) == GenerationDefaults(temperature=0.0)
    (tmp_path / GENERATION_CONFIG).unlink()
    assert Checkpoint.open(tmp_path).generation == GenerationDefaults()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("do_sample", 1),
        ("eos_token_id", [320]),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{GENERATION_CONFIG}: {key}") as caught:
        open_with(tmp_path, {key: value})
    assert caught.value.file == GENERATION_CONFIG
