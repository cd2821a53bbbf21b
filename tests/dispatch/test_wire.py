"""Rows that travel in fewer bytes: how far they are rounded, and that both ends agree."""

import threading
from pathlib import Path

import pytest
import torch

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.handshake import Hello, HostIdentity
from llama4_dist.dispatch.links.connect import connect
from llama4_dist.dispatch.links.link import Link, LinkLimits
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.dispatch.links.wire import Wire, WireFormat
from llama4_dist.dispatch.routing_table import Replica, RoutingTable
from llama4_dist.errors import ConfigError, EngineError, HandshakeError

WIDTH, NUM_EXPERTS = 256, 4
SECRET = b"0123456789abcdef0123456789abcdef"
WIRES = [Wire.BFLOAT16, Wire.FLOAT8]


class Doubling:
    """Experts that multiply by two."""

    holds = frozenset((0, expert) for expert in range(NUM_EXPERTS))

    def adopt(self, pairs: object) -> None:
        raise AssertionError("nothing is missing")

    def __call__(self, layer: int, groups: object, x_RD: torch.Tensor, out_RD: torch.Tensor) -> None:
        torch.mul(x_RD, 2.0, out=out_RD)


def server_of(host: str, wire: str) -> ExpertServer:
    identity = HostIdentity(host=host, incarnation=0, model_hash="any", num_layers=1, num_experts=NUM_EXPERTS)
    return ExpertServer(
        identity=identity, compute=Doubling(), width=WIDTH, dtype=torch.float32, limits=LinkLimits(), wire=wire
    )


def dispatcher_of(links: dict[str, Link]) -> Dispatcher:
    hosts = sorted(links)
    replicas = {(0, expert): (Replica(hosts[expert % len(hosts)], 0),) for expert in range(NUM_EXPERTS)}
    table = RoutingTable(epoch=0, replicas=replicas)
    return Dispatcher(worker="worker", incarnation=0, table=table, links=links, width=WIDTH, dtype=torch.float32)


def hello_of(wire: str) -> Hello:
    return Hello(
        role="attention",
        id="worker",
        incarnation=0,
        model_hash="any",
        width=WIDTH,
        dtype="float32",
        num_layers=1,
        num_experts=NUM_EXPERTS,
        wire=wire,
    )


def batch(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, WIDTH, generator=generator)
    return x_TD, torch.arange(num_tokens)[:, None] % NUM_EXPERTS, torch.rand(num_tokens, 1, generator=generator)


@pytest.mark.parametrize(("wire", "largest", "typical"), [("bfloat16", 2**-8, 0.002), ("float8_e4m3", 2**-4, 0.03)])
def test_rows_are_rounded_as_far_as_the_format_says(wire: str, largest: float, typical: float) -> None:
    """A normal number of p bits of fraction is rounded by at most 2^-(p + 1); a block of 128 shares a scale."""
    rows_ND = torch.randn(64, WIDTH) * torch.logspace(-6, 6, 64)[:, None]
    form = WireFormat(wire, WIDTH, torch.float32)
    error_ND = (form.round(rows_ND) - rows_ND).abs()
    normal = rows_ND.abs() > rows_ND.abs().amax(dim=1, keepdim=True) / 2**13
    assert (error_ND / rows_ND.abs())[normal].max() <= largest
    relative = error_ND.norm(dim=1) / rows_ND.norm(dim=1)
    assert relative.max() < typical
    assert form.pack(rows_ND).nbytes <= rows_ND.nbytes // 2


def test_a_block_does_not_see_the_others_and_zeros_stay_zeros() -> None:
    form = WireFormat("float8_e4m3", WIDTH, torch.float32)
    rows_ND = torch.zeros(2, WIDTH)
    rows_ND[0, :128], rows_ND[0, 128:] = 1e-6, 1e6
    assert torch.allclose(form.round(rows_ND), rows_ND, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 100, 192])
def test_the_last_block_may_be_shorter(width: int) -> None:
    rows_ND = torch.randn(5, width)
    form = WireFormat("float8_e4m3", width, torch.float32)
    assert form.pack(rows_ND).shape == (5, form.wire_width)
    assert torch.allclose(form.round(rows_ND), rows_ND, rtol=2**-4, atol=1e-2)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_arrives_as_not_finite(wire: str, poison: float) -> None:
    form = WireFormat(wire, WIDTH, torch.float32)
    rows_ND = torch.ones(2, WIDTH)
    rows_ND[1, 130] = poison
    assert torch.isfinite(form.round(rows_ND)).all(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("wire", WIRES)
def test_answers_depend_neither_on_the_batch_nor_on_the_hosts(wire: str, tmp_path: Path) -> None:
    form = WireFormat(wire, WIDTH, torch.float32)
    x_TD, experts_TK, scores_TK = batch(40)
    expected_TD = form.round(2.0 * form.round(x_TD * scores_TK))
    assert not torch.equal(expected_TD, 2.0 * (x_TD * scores_TK))
    for hosts in (("a",), ("a", "b", "c")):
        dispatcher = dispatcher_of(
            {name: server_of(name, wire).open_inproc(worker="w", incarnation=0) for name in hosts}
        )
        for tokens in (slice(0, 40), slice(3, 4), slice(7, 30)):
            y_TD = dispatcher.combine(
                dispatcher.dispatch(0, x_TD[tokens], experts_TK[tokens], scores_TK[tokens].contiguous())
            )
            assert torch.equal(y_TD, expected_TD[tokens])


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_rows_travel_in_fewer_bytes_by_sockets_too(wire: str, transport: str, tmp_path: Path) -> None:
    form = WireFormat(wire, WIDTH, torch.float32)
    server = server_of("a", wire)
    address = f"unix:{tmp_path}/links/a" if transport == "unix" else "tcp:127.0.0.1:0"
    listener = Listener(address, secret=SECRET)
    server.add_listener(listener)
    stop = threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        link = connect(listener.address, hello=hello_of(wire), secret=SECRET, limits=LinkLimits(), timeout_s=5.0)
        dispatcher = dispatcher_of({"a": link})
        for num_tokens in (1, 40, 2000):
            x_TD, experts_TK, scores_TK = batch(num_tokens)
            y_TD = dispatcher.combine(dispatcher.dispatch(0, x_TD, experts_TK, scores_TK))
            assert torch.equal(y_TD, form.round(2.0 * form.round(x_TD * scores_TK)))
        stats = link.stats()
        num_bytes = stats.bytes_out + stats.shared_bytes_out
        assert num_bytes < 2041 * WIDTH * 4 * (0.52 if wire == Wire.BFLOAT16 else 0.27)
        with pytest.raises(EngineError, match="not finite before"):
            dispatcher.combine(dispatcher.dispatch(0, x_TD * float("nan"), experts_TK, scores_TK))
        with pytest.raises(HandshakeError) as refused:
            connect(listener.address, hello=hello_of(""), secret=SECRET, limits=LinkLimits(), timeout_s=5.0)
        assert refused.value.reason == "WIRE_DIFFERS"
        dispatcher.close()
    finally:
        stop.set()
        server.wake()
        thread.join()
        server.close()


def test_a_format_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        WireFormat("int4", 128, torch.float32)
