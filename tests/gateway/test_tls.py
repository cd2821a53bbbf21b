"""TLS and mutual TLS over real sockets, with certificates made for the test."""

import datetime
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import trustme

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import ConfigError, UnavailableError
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.gateway.tls import server_credentials
from llama4_dist.request import Sampling
from tests.gateway.corpus import INFERENCE
from tests.gateway.scripted_engine import ScriptedEngine, expected_tokens
from tests.gateway.serving import serving
from tests.gateway.test_auth import ADMIN_METHOD


class Files:
    """A CA with a server's and a client's certificate, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.server, self.server_key = self.issue("server", "localhost", "127.0.0.1")
        self.client, self.client_key = self.issue("client", "client.example")

    def issue(self, name: str, *identities: str, **options: object) -> tuple[Path, Path]:
        """Write a certificate and its key."""
        leaf = self.authority.issue_cert(*identities, **options)  # type: ignore[arg-type]
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        leaf.cert_chain_pems[0].write_to_path(str(certificate))
        leaf.private_key_pem.write_to_path(str(key))
        return certificate, key

    @property
    def settings(self) -> GatewaySettings:
        return GatewaySettings(tls_certificate=self.server, tls_key=self.server_key)

    @property
    def mutual(self) -> GatewaySettings:
        return replace(self.settings, tls_client_ca=self.ca)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def generate(address: str, options: ConnectOptions) -> tuple[int, ...]:
    with Client(address, replace(options, max_attempts=1, timeout_s=10)) as client:
        return client.generate([1], Sampling(max_tokens=3)).token_ids


def test_a_client_that_trusts_the_ca_is_served(files: Files) -> None:
    with serving(ScriptedEngine(), settings=files.settings) as served:
        assert generate(served.address, ConnectOptions(tls_ca=files.ca)) == expected_tokens([1], 3)
        stranger = Files(files.folder / "..")
        for options in (ConnectOptions(), ConnectOptions(tls=True), ConnectOptions(tls_ca=stranger.ca)):
            with pytest.raises(UnavailableError):
                generate(served.address, options)


def test_mutual_tls_serves_only_clients_of_the_ca(files: Files, tmp_path_factory: pytest.TempPathFactory) -> None:
    stranger = Files(tmp_path_factory.mktemp("stranger"))
    with serving(ScriptedEngine(), settings=files.mutual) as served:
        known = ConnectOptions(tls_ca=files.ca, tls_certificate=files.client, tls_key=files.client_key)
        assert generate(served.address, known) == expected_tokens([1], 3)
        forged = replace(known, tls_certificate=stranger.client, tls_key=stranger.client_key)
        for options in (ConnectOptions(tls_ca=files.ca), forged):
            with pytest.raises(UnavailableError):
                generate(served.address, options)


def test_new_files_are_used_without_a_restart(files: Files) -> None:
    with serving(ScriptedEngine(), settings=files.settings) as served:
        old_ca = files.ca.read_bytes()
        files.authority = trustme.CA()
        files.issue("server", "localhost", "127.0.0.1")
        files.authority.cert_pem.write_to_path(str(files.ca))
        assert generate(served.address, ConnectOptions(tls_ca=files.ca)) == expected_tokens([1], 3)
        files.ca.write_bytes(old_ca)
        with pytest.raises(UnavailableError):
            generate(served.address, ConnectOptions(tls_ca=files.ca))


def test_a_bad_rotation_keeps_the_old_certificate(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    with serving(ScriptedEngine(), settings=files.settings) as served:
        files.server_key.write_bytes(files.client_key.read_bytes())
        assert generate(served.address, ConnectOptions(tls_ca=files.ca)) == expected_tokens([1], 3)
    assert "tls_reload_failed" in caplog.text


def test_a_key_of_another_certificate_is_refused_at_start(files: Files) -> None:
    with pytest.raises(ConfigError, match="tls_key"):
        server_credentials(replace(files.settings, tls_key=files.client_key))


def test_an_expired_certificate_is_refused_at_start(files: Files) -> None:
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    files.issue("server", "localhost", not_before=past, not_after=past + datetime.timedelta(days=1))
    with pytest.raises(ConfigError, match="expired"):
        server_credentials(files.settings)


@pytest.mark.parametrize("content", [b"", b"not a certificate"])
def test_files_that_hold_no_certificate_are_refused(files: Files, content: bytes) -> None:
    files.ca.write_bytes(content)
    with pytest.raises(ConfigError, match="tls_client_ca"):
        server_credentials(files.mutual)
    files.server.write_bytes(content)
    with pytest.raises(ConfigError, match="tls_certificate"):
        server_credentials(files.settings)


def test_a_missing_file_is_refused(files: Files) -> None:
    files.server_key.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        server_credentials(files.settings)


def test_settings_that_contradict_are_refused(files: Files) -> None:
    with pytest.raises(ConfigError, match="go together"):
        GatewaySettings(tls_certificate=files.server)
    with pytest.raises(ConfigError, match="tls_client_ca needs"):
        GatewaySettings(tls_client_ca=files.ca)
    with pytest.raises(ConfigError, match="go together"):
        ConnectOptions(tls_key=files.server_key)


def test_mutual_tls_alone_does_not_grant_admin_beyond_loopback(files: Files) -> None:
    settings = replace(files.mutual, address="0.0.0.0:0")
    credentials = grpc.ssl_channel_credentials(
        files.ca.read_bytes(), files.client_key.read_bytes(), files.client.read_bytes()
    )
    with serving(ScriptedEngine(), settings=settings, address="0.0.0.0:0") as served:
        address = served.address
        with grpc.secure_channel(address, credentials) as channel:
            administer: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(ADMIN_METHOD)
            list_models: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFERENCE + "ListModels")
            with pytest.raises(grpc.RpcError) as refused:
                administer(b"")
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert list_models(b"")
