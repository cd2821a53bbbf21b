"""Who may administer a cluster, over which transport, and what a probe sees."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.admin.settings import AdminSettings
from llama4_dist.client.admin import AdminClient
from llama4_dist.client.options import ConnectOptions
from llama4_dist.errors import ConfigError, PermissionDeniedError, UnauthenticatedError, UnavailableError
from tests.cluster.admin_serving import Served, admin_serving
from tests.cluster.memory_control import MemoryControl

NORMAL = "normal-token-0123456789"
ADMIN = "admin-token-0123456789"
CLUSTER = "/llama4_dist.v1.ClusterService/"
EXPERTS = "/llama4_dist.v1.ExpertService/"
OPERATIONS = "/google.longrunning.Operations/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = [
    *(
        CLUSTER + name
        for name in (
            "GetCluster",
            "ListWorkers",
            "WatchCluster",
            "ScaleExpertPool",
            "RebalanceExperts",
            "DrainWorker",
        )
    ),
    *(EXPERTS + name for name in ("GetPlacement", "ListExpertLoads", "WatchPlacement", "WatchExpertLoads")),
    *(
        OPERATIONS + name
        for name in ("GetOperation", "ListOperations", "WaitOperation", "CancelOperation", "DeleteOperation")
    ),
    REFLECTION,
    CLUSTER + "Nothing",
    "/no.Such/One",
]


def write_tokens(folder: Path, text: str) -> Path:
    file = folder / "tokens"
    file.write_text(text)
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = write_tokens(tmp_path_factory.mktemp("admin"), f"{NORMAL}\nadmin {ADMIN}\n")
    with admin_serving(MemoryControl(), AdminSettings(token_file=file, watch_interval_s=0.02)) as served:
        yield served


def code_of(served: Served, method: str, token: str = "") -> grpc.StatusCode:
    """Call with an empty request and read at most one answer."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(served.address) as channel:
        method_of: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
        call = method_of(b"", metadata=metadata, timeout=5)
        try:
            next(call, None)
        except grpc.RpcError as error:
            return error.code()
        finally:
            call.cancel()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS)
def test_every_method_asks_for_the_admin_scope(guarded: Served, method: str) -> None:
    assert code_of(guarded, method) is grpc.StatusCode.UNAUTHENTICATED
    assert code_of(guarded, method, NORMAL + "x") is grpc.StatusCode.UNAUTHENTICATED
    assert code_of(guarded, method, NORMAL) is grpc.StatusCode.PERMISSION_DENIED
    refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    assert code_of(guarded, method, ADMIN) not in refused


def test_every_method_of_the_protos_is_served(guarded: Served) -> None:
    named = [method for method in METHODS if method not in (CLUSTER + "Nothing", "/no.Such/One")]
    unbuilt = [method for method in named if code_of(guarded, method, ADMIN) is grpc.StatusCode.UNIMPLEMENTED]
    assert unbuilt == []


def test_the_client_sends_its_token(guarded: Served) -> None:
    with AdminClient(guarded.address, ConnectOptions(token=ADMIN)) as client:
        assert client.status().num_hosts == 4
    with AdminClient(guarded.address, ConnectOptions(token=NORMAL)) as client, pytest.raises(PermissionDeniedError):
        client.scale(5)
    with AdminClient(guarded.address) as client, pytest.raises(UnauthenticatedError):
        next(client.watch())


def test_health_needs_no_token_and_follows_the_controller(guarded: Served) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for answer in stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=10):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
        assert stub.Check(health_pb2.HealthCheckRequest(service="startup")).status == answer.status


def test_readiness_goes_off_while_the_controller_is_away_and_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.admin.server.READINESS_INTERVAL_S", 0.02)
    control = MemoryControl()
    with admin_serving(control) as served, grpc.insecure_channel(served.address) as channel:
        states = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="readiness"), timeout=20
        )
        while next(states).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        control.away = True
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        control.away = False
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        states.cancel()


def test_reflection_lists_the_services(guarded: Served) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([request]), metadata=[("authorization", f"Bearer {ADMIN}")]
        )
        names = {service.name for service in next(answers).list_services_response.service}
    assert names == {
        "llama4_dist.v1.ClusterService",
        "llama4_dist.v1.ExpertService",
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_can_be_off() -> None:
    with admin_serving(MemoryControl(), AdminSettings(reflection=False)) as served:
        assert code_of(served, REFLECTION) is grpc.StatusCode.UNIMPLEMENTED


def test_a_field_the_server_does_not_know_is_refused() -> None:
    with admin_serving(MemoryControl()) as served, grpc.insecure_channel(served.address) as channel:
        scale: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CLUSTER + "ScaleExpertPool")
        with pytest.raises(grpc.RpcError) as refused:
            scale(b"\x08\x05\xf8\x07\x01")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as refused:
            scale(b"\xff\xff\xff")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_defect_of_the_control_plane_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    control = MemoryControl()
    nothing: dict[str, Any] = {}
    control.view = lambda: nothing["secret"]  # type: ignore[method-assign]
    with admin_serving(control) as served, grpc.insecure_channel(served.address) as channel:
        get: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CLUSTER + "GetCluster")
        with pytest.raises(grpc.RpcError) as refused:
            get(b"")
        assert refused.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (refused.value.details() or "")
    assert "secret" in caplog.text


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:50052", "admin.example:50052"])
def test_an_address_others_can_reach_needs_a_credential(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_file or tls_client_ca"):
        AdminSettings(address=address)
    with pytest.raises(ConfigError, match="token_file or tls_client_ca"):
        AdminSettings(address=address, tls_certificate=tmp_path / "c", tls_key=tmp_path / "k")
    assert AdminSettings(address=address, token_file=tmp_path / "tokens").address == address


@pytest.mark.parametrize("name", ["num_threads", "call_timeout_s", "watch_interval_s", "max_calls"])
def test_a_size_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        AdminSettings(**{name: 0})  # type: ignore[arg-type]


def test_a_token_file_that_lets_nobody_in_is_refused(tmp_path: Path) -> None:
    settings = AdminSettings(token_file=write_tokens(tmp_path, f"{NORMAL}\n"))
    with pytest.raises(ConfigError, match="admin TOKEN"), admin_serving(MemoryControl(), settings):
        pass


def test_a_certificate_of_the_ports_own_ca_is_the_admin_credential(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca, server, client = tmp_path / "ca.pem", tmp_path / "server.pem", tmp_path / "client.pem"
    authority.cert_pem.write_to_path(str(ca))
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(server))
    authority.issue_cert("admin.example").private_key_and_cert_chain_pem.write_to_path(str(client))
    settings = AdminSettings(tls_certificate=server, tls_key=server, tls_client_ca=ca)
    with admin_serving(MemoryControl(), settings) as served:
        known = ConnectOptions(tls_ca=ca, tls_certificate=client, tls_key=client, max_attempts=1, timeout_s=10)
        with AdminClient(served.address, known) as connected:
            assert connected.scale(5).kind == "scale"
        stranger = ConnectOptions(tls_ca=ca, max_attempts=1, timeout_s=10)
        with AdminClient(served.address, stranger) as connected, pytest.raises(UnavailableError):
            connected.status()
