"""Who may call what; nobody learns which methods exist without a token."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.longrunning import operations_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llama4_dist.client import Client, ConnectOptions
from llama4_dist.errors import ConfigError, NotFoundError, UnauthenticatedError
from llama4_dist.gateway.auth import Scope, is_open_to_others, read_tokens
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from tests.gateway.corpus import HEALTH, INFERENCE, REFLECTION, STREAMING, UNARY
from tests.gateway.scripted_engine import ScriptedEngine
from tests.gateway.serving import Served, serving
from tests.waiting import wait_until

NORMAL = "normal-token-0123456789"
OTHER = "other-token-0123456789"
ADMIN = "admin-token-0123456789"
ADMIN_METHOD = "/llama4_dist.v1.ClusterService/GetCluster"


def write_tokens(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "tokens"
    file.write_text(text)
    file.chmod(mode)
    return file


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    text = f"# service tokens\n{NORMAL}\n\n{OTHER}\nadmin {ADMIN}\n"
    file = write_tokens(tmp_path_factory.mktemp("auth"), text)
    with serving(ScriptedEngine(step_s=0.002), settings=GatewaySettings(token_file=file)) as running:
        yield running


def code_of(served: Served, method: str, *authorization: str) -> grpc.StatusCode:
    with grpc.insecure_channel(served.address) as channel:
        try:
            metadata = tuple(("authorization", value) for value in authorization)
            call: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
            list(call(b"", metadata=metadata, timeout=5))
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    "method", [*UNARY, *STREAMING, REFLECTION, ADMIN_METHOD, INFERENCE + "Nothing", "/no.Such/One"]
)
@pytest.mark.parametrize(
    "authorization",
    [
        (),
        ("",),
        ("Bearer wrong",),
        ("Bearer ",),
        (f"Basic {NORMAL}",),
        (NORMAL,),
        (f"Bearer {NORMAL}x",),
        (f"Bearer {NORMAL}"[:-1],),
        (f"Bearer {NORMAL}", f"Bearer {NORMAL}"),
    ],
)
def test_without_the_right_token_every_method_is_unauthenticated(
    served: Served, method: str, authorization: tuple[str, ...]
) -> None:
    assert code_of(served, method, *authorization) is grpc.StatusCode.UNAUTHENTICATED


def test_with_a_token_the_method_decides(served: Served) -> None:
    bearer = f"Bearer {NORMAL}"
    assert code_of(served, INFERENCE + "Generate", bearer) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(served, INFERENCE + "Nothing", bearer) is grpc.StatusCode.UNIMPLEMENTED
    assert code_of(served, "/no.Such/One", bearer) is grpc.StatusCode.UNIMPLEMENTED
    assert code_of(served, INFERENCE + "ListModels", f"bearer {NORMAL}") is grpc.StatusCode.OK


def test_admin_methods_need_the_admin_scope(served: Served) -> None:
    assert code_of(served, ADMIN_METHOD, f"Bearer {NORMAL}") is grpc.StatusCode.PERMISSION_DENIED
    # the service is not registered in this server
    assert code_of(served, ADMIN_METHOD, f"Bearer {ADMIN}") is grpc.StatusCode.UNIMPLEMENTED


def test_health_needs_no_token(served: Served) -> None:
    assert code_of(served, HEALTH + "Check") is grpc.StatusCode.OK
    with grpc.insecure_channel(served.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="readiness"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_client_sends_its_token(served: Served) -> None:
    with Client(served.address, ConnectOptions(token=NORMAL)) as client:
        assert client.generate([1], Sampling(max_tokens=1)).token_ids
    with Client(served.address) as client, pytest.raises(UnauthenticatedError):
        client.generate([1], Sampling(max_tokens=1))


def test_another_tenants_request_id_is_free(served: Served) -> None:
    with (
        Client(served.address, ConnectOptions(token=NORMAL)) as one,
        Client(served.address, ConnectOptions(token=OTHER)) as two,
    ):
        stream = one.stream_generate([1], Sampling(max_tokens=500), request_id="mine")
        next(iter(stream))
        assert two.generate([2], Sampling(max_tokens=2), request_id="mine").token_ids
        stream.close()
    wait_until(lambda: served.gateway.generations.num_running == 0)


def test_engines_learn_who_is_the_same_tenant_and_no_credential(tmp_path: Path) -> None:
    engine, file = ScriptedEngine(), write_tokens(tmp_path, f"{NORMAL}\n{OTHER}\n")
    with serving(engine, settings=GatewaySettings(token_file=file)) as served:
        for token in (NORMAL, OTHER, NORMAL):
            with Client(served.address, ConnectOptions(token=token)) as client:
                client.generate([1], Sampling(max_tokens=1))
    one, two, again = (made.tenant for made in engine.submitted)
    assert one == again != two
    assert len(one) == len(two) == 64, "an HMAC of the credential's digest"
    assert not {one, two} & {hashlib.sha256(f"Bearer {token}".encode()).hexdigest() for token in (NORMAL, OTHER)}


def test_scopes_are_read_from_the_file(tmp_path: Path) -> None:
    tokens = read_tokens(write_tokens(tmp_path, f"{NORMAL}\nadmin {ADMIN}\n"))
    assert tokens.scope_of(NORMAL) is Scope.NORMAL
    assert tokens.scope_of(ADMIN) is Scope.ADMIN
    assert tokens.scope_of("") is None
    assert tokens.scope_of("é" * 20) is None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_a_token_file_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_tokens(write_tokens(tmp_path, NORMAL, mode))


@pytest.mark.parametrize(
    ("owner", "group", "mode", "user", "is_open"),
    [
        (0, 10001, 0o440, 10001, False),  # a Secret's volume with fsGroup
        (0, 10001, 0o460, 10001, True),
        (0, 10001, 0o444, 10001, True),
        (0, 500, 0o440, 10001, True),  # a group that is not the service's
        (10001, 10001, 0o440, 10001, True),  # the service's own file: nobody but itself opened it
        (0, 10001, 0o440, 0, True),  # root needs no group
        (0, 10001, 0o400, 10001, False),
    ],
)
def test_root_may_hand_a_token_file_to_the_group_of_a_service(
    owner: int, group: int, mode: int, user: int, is_open: bool
) -> None:
    info = os.stat_result((mode, 0, 0, 1, owner, group, 0, 0, 0, 0))
    assert is_open_to_others(info, user=user, groups={10001}) is is_open


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "short\n", f"root {NORMAL}\n", f"a b {NORMAL}\n"])
def test_a_token_file_without_good_tokens_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="token_file"):
        read_tokens(write_tokens(tmp_path, text))


def test_a_token_file_error_never_shows_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read_tokens(write_tokens(tmp_path, f"{NORMAL} {ADMIN} x\n"))
    assert NORMAL not in str(refused.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_tokens(tmp_path / "missing")
    (tmp_path / "big").write_bytes(b"a" * (1 << 20))
    os.chmod(tmp_path / "big", 0o600)
    with pytest.raises(ConfigError, match="0 tokens"):
        read_tokens(tmp_path / "big")


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "[::]:50051", "192.0.2.7:50051", "gateway.example:50051"])
def test_an_address_others_can_reach_needs_a_credential(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_file or tls_client_ca"):
        GatewaySettings(address=address)
    with pytest.raises(ConfigError, match="token_file or tls_client_ca"):
        GatewaySettings(address=address, tls_certificate=tmp_path / "c", tls_key=tmp_path / "k")
    GatewaySettings(address=address, token_file=tmp_path / "tokens")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:1", "[::1]:65535", "127.8.8.8:9"])
def test_loopback_needs_none(address: str) -> None:
    assert GatewaySettings(address=address).address == address


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", ":1", "127.0.0.1:65536", "127.0.0.1:x", "localhost:²"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        GatewaySettings(address=address)


@pytest.mark.parametrize("address", ["0.0.0.0:9100", "192.0.2.7:9100", "[::]:9100"])
def test_metrics_leave_loopback_only_for_holders_of_a_token(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metrics_token_file"):
        GatewaySettings(metrics_address=address)
    GatewaySettings(metrics_address=address, metrics_token_file=tmp_path / "tokens")


def test_a_taken_port_is_refused(served: Served) -> None:
    with pytest.raises(ConfigError, match="is it taken"), serving(ScriptedEngine(), address=served.address):
        pass


class Operations:
    """An admin service of the caller's."""

    async def GetOperation(self, request: operations_pb2.GetOperationRequest, context: object) -> object:
        if request.name != "operations/1":
            raise NotFoundError("no such operation", reason="OPERATION_NOT_FOUND")
        return operations_pb2.Operation(name=request.name, done=True)


def test_a_callers_own_admin_service_is_served_to_admins_only(tmp_path: Path) -> None:
    file = write_tokens(tmp_path, f"{NORMAL}\nadmin {ADMIN}\n")
    services = {operations_pb2.DESCRIPTOR.services_by_name["Operations"]: Operations()}
    settings = GatewaySettings(token_file=file)
    with (
        serving(ScriptedEngine(), settings=settings, extra_services=services) as served,
        grpc.insecure_channel(served.address) as channel,
    ):
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/google.longrunning.Operations/GetOperation"
        )

        def call(name: str, token: str) -> tuple[grpc.StatusCode, bytes]:
            try:
                data = operations_pb2.GetOperationRequest(name=name).SerializeToString()
                return grpc.StatusCode.OK, method(data, metadata=(("authorization", f"Bearer {token}"),))
            except grpc.RpcError as error:
                return error.code(), b""

        assert call("operations/1", NORMAL)[0] is grpc.StatusCode.PERMISSION_DENIED
        assert call("operations/2", ADMIN)[0] is grpc.StatusCode.NOT_FOUND
        assert operations_pb2.Operation.FromString(call("operations/1", ADMIN)[1]).done
        unbuilt: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/google.longrunning.Operations/WaitOperation"
        )
        with pytest.raises(grpc.RpcError) as refused:
            unbuilt(b"", metadata=(("authorization", f"Bearer {ADMIN}"),))
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
