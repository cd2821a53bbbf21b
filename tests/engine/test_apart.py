"""Loading leaves no thread behind: one that computed keeps its OpenMP team, and the engine's own stops spinning."""

import threading
from pathlib import Path
from typing import Any

import pytest

from llama4_dist.engine import build
from llama4_dist.engine.apart import apart
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.model.load import load_model
from tests.checkpoints import make_checkpoint


def test_weights_are_loaded_in_a_thread_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders: list[threading.Thread] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        loaders.append(threading.current_thread())
        return load_model(*args, **kwargs)

    monkeypatch.setattr(build, "load_model", watched)
    engine = build_single_process(make_checkpoint(tmp_path, "scout"), options=EngineOptions(num_blocks=8))
    engine.close()
    assert len(loaders) == 1
    assert loaders[0] is not threading.current_thread()
    assert not loaders[0].is_alive()


def test_what_fails_apart_fails_for_the_caller() -> None:
    @apart
    def broken(reason: str) -> None:
        raise ValueError(reason)

    with pytest.raises(ValueError, match="because"):
        broken("because")
