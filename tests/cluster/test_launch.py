"""The cluster secret, and a Ray that is ours."""

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.driver.launch import RaySession, ensure_ray
from cluster.driver.socket_folder import FALLBACK, MAX_PATH_BYTES, socket_folder
from llama4_dist.errors import ConfigError, UnavailableError
from llama4_dist.rpc.cluster_secret import SECRET_FILE_VARIABLE, cluster_secret


def test_a_secret_is_fresh_unless_a_file_is_named(tmp_path: Path) -> None:
    assert len(cluster_secret({})) == 32
    assert cluster_secret({}) != cluster_secret({})
    path = tmp_path / "secret"
    path.write_bytes(b"0123456789abcdef\n")
    path.chmod(0o600)
    assert cluster_secret({SECRET_FILE_VARIABLE: str(path)}) == b"0123456789abcdef"


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (b"", 0o600, "holds 0 bytes"),
        (b"short", 0o600, "holds 5 bytes"),
        (b"x" * 5000, 0o600, "holds"),
        (b"x" * 32, 0o604, "open to everyone"),
    ],
)
def test_a_bad_secret_file_is_refused(tmp_path: Path, content: bytes, mode: int, message: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        cluster_secret({SECRET_FILE_VARIABLE: str(path)})


def test_a_missing_secret_file_and_a_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        cluster_secret({SECRET_FILE_VARIABLE: str(tmp_path / "none")})
    os.mkfifo(tmp_path / "fifo", mode=stat.S_IRUSR)
    with pytest.raises(ConfigError, match="holds 0 bytes"):
        cluster_secret({SECRET_FILE_VARIABLE: str(tmp_path / "fifo")})


def connections(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections("tcp")
    except psutil.NoSuchProcess:  # it ended between being listed and being asked
        return []


@pytest.mark.ray
def test_a_ray_of_ours_is_closed_to_others_and_leaves_nothing() -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    session = ensure_ray()
    try:
        assert session.started_here
        assert session.temp_dir is not None
        assert os.environ["RAY_AUTH_MODE"] == "token"
        ours = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        listening = [c for p in (*ours, psutil.Process()) for c in connections(p) if c.status == "LISTEN"]
        assert listening
        assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        second = ensure_ray()
        assert second == RaySession(started_here=False, connected_here=False)
        second.close()
        assert ray.is_initialized(), "closing a session that joined must leave Ray as it was"
    finally:
        session.close()
    assert not ray.is_initialized()
    assert not session.temp_dir.exists()
    assert "RAY_AUTH_MODE" not in os.environ
    _, alive = psutil.wait_procs(ours, timeout=10)
    assert alive == []


def test_sockets_lie_in_the_temporary_folder_as_long_as_their_paths_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = MAX_PATH_BYTES - len(os.fsencode(tmp_path)) - 1
    assert socket_folder("x" * room) == tmp_path
    assert socket_folder("x" * (room + 1)) == FALLBACK
    monkeypatch.setattr(tempfile, "tempdir", "/ä")
    assert socket_folder("x" * (MAX_PATH_BYTES - 4)) == Path("/ä"), "bytes count, not characters"
    assert socket_folder("x" * (MAX_PATH_BYTES - 3)) == FALLBACK


@pytest.mark.ray
def test_a_ray_starts_below_a_deep_temporary_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("scratch" * 10)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    session = ensure_ray()
    try:
        assert ray.is_initialized()
    finally:
        session.close()
    assert session.temp_dir is not None
    assert not session.temp_dir.exists()


@pytest.mark.ray
def test_an_address_where_no_ray_answers_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        ensure_ray("127.0.0.1:1")
