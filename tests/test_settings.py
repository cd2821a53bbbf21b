"""Settings: precedence, and every wrong value refused by the name of its field (cases F01–F17)."""

from pathlib import Path
from typing import Any

import pytest

from llama4_dist.errors import ConfigError
from llama4_dist.settings import ServeSettings, load_settings
from llama4_dist.settings_file import MAX_FILE_BYTES


def load(
    flags: dict[str, Any] | None = None, *, file: Path | None = None, environ: dict[str, str] | None = None
) -> ServeSettings:
    return load_settings({"model": "m", **(flags or {})}, file=file, environ=environ or {})


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max_num_seqs: 1\nmax_waiting: 2\nblock_size: 3\n")
    environ = {"LLAMA4_DIST_MAX_WAITING": "20", "LLAMA4_DIST_BLOCK_SIZE": "30", "UNRELATED": "x"}
    settings = load({"block_size": 300, "max_num_seqs": None}, file=file, environ=environ)
    assert (settings.max_num_seqs, settings.max_waiting, settings.block_size) == (1, 20, 300)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"speed": "fast"}, "speed"),
        ({"experts": "many"}, "experts"),
        ({"experts": -1}, "experts"),
        ({"experts": 2.5}, "experts"),
        ({"attention": 0}, "attention"),
        ({"attention": 2}, "attention"),
        ({"address": "nowhere"}, "address"),
        ({"address": "127.0.0.1:70000"}, "address"),
        ({"address": "127.0.0.1:-1"}, "address"),
        ({"address": ":50051"}, "address"),
        ({"metrics_address": "127.0.0.1:50051"}, "metrics_address"),
        ({"metrics_address": "somewhere"}, "somewhere"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes"),
        ({"drain_timeout_s": 0}, "drain_timeout_s"),
        ({"drain_timeout_s": -1}, "drain_timeout_s"),
        ({"drain_timeout_s": float("nan")}, "drain_timeout_s"),
        ({"max_request_s": float("inf")}, "max_request_s"),
        ({"dtype": "int3"}, "dtype"),
        ({"weights": "int4"}, "weights"),
        ({"device": "tpu"}, "device"),
        ({"log_format": "xml"}, "log_format"),
        ({"tls_key": "key.pem"}, "tls_certificate"),
        ({"tls_client_ca": "ca.pem"}, "tls_client_ca"),
        ({"ray_address": "127.0.0.1:6379"}, "ray_address"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(flags)


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)attention.*block_size|block_size.*attention"):
        load({"attention": 0, "block_size": 0})


def test_a_variable_that_names_no_setting_is_a_typo() -> None:
    with pytest.raises(ConfigError, match="LLAMA4_DIST_EXPERT "):
        load(environ={"LLAMA4_DIST_EXPERT": "4"})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("experts: 1\nexperts: 2\n", "given twice"),
        ("a: &a [1]\nb: *a\n", "aliases"),
        ("experts:\t1\n\tattention: 2", "not valid YAML"),
        ("experts: \x00", "not valid YAML"),
        ("- experts", "mapping"),
        ("3", "mapping"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("expert: 3", "expert"),
    ],
)
def test_a_hostile_or_broken_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load(file=file)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    with file.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match="at most"):
        load(file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load(file=tmp_path / "absent.yaml")


def test_an_empty_file_is_no_settings(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("# nothing\n")
    assert load(file=file) == load()
