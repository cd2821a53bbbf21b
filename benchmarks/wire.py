"""Measure what rounding rows on their way costs in accuracy: rows, and the logits of the bundled model.

One process, one host behind a link that rounds as a socket's would; the same prompt with each format.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.handshake import HostIdentity
from llama4_dist.dispatch.links.link import LinkLimits
from llama4_dist.dispatch.links.wire import Wire, WireFormat
from llama4_dist.dispatch.routing_table import Replica, RoutingTable
from llama4_dist.engine.build import build_engine
from llama4_dist.engine.options import EngineOptions
from llama4_dist.model.expert_store import ExpertStore


def dispatcher_over(checkpoint: Checkpoint, wire: Wire) -> Dispatcher:
    config = checkpoint.config
    pairs = [(layer, expert) for layer in config.moe_layer_ids for expert in range(config.num_experts)]
    store = ExpertStore(checkpoint, dtype=torch.float32, device="cpu")
    store.add(pairs)
    identity = HostIdentity(
        host="host", incarnation=0, model_hash="any", num_layers=config.num_layers, num_experts=config.num_experts
    )
    server = ExpertServer(
        identity=identity,
        compute=store,
        width=config.hidden_size,
        dtype=torch.float32,
        limits=LinkLimits(),
        wire=wire,
    )
    whole = (Replica("host", 0),)
    return Dispatcher(
        worker="worker",
        incarnation=0,
        table=RoutingTable(epoch=0, replicas=dict.fromkeys(pairs, whole)),
        links={"host": server.open_inproc(worker="worker", incarnation=0)},
        width=config.hidden_size,
        dtype=torch.float32,
    )


def logits_of(checkpoint: Checkpoint, wire: Wire, token_ids: list[int]) -> Tensor:
    with ExitStack() as resources:
        engine = build_engine(
            checkpoint,
            dispatcher_over(checkpoint, wire),
            options=EngineOptions(max_num_seqs=1),
            dtype=torch.float32,
            device="cpu",
        )
        resources.callback(engine.close)
        engine.start(lambda outputs: None)
        return engine.score(token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/llama4-mini"))
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, checkpoint.config.vocab_size, (arguments.tokens,), generator=generator).tolist()
    exact_TV = logits_of(checkpoint, Wire.MODEL, token_ids)
    rows_ND = torch.randn(1024, checkpoint.config.hidden_size, generator=generator)
    table = Table(title="rounding of rows on the wire; float32 model, relative errors are norms")
    for column in ("wire", "bytes a row", "row error", "logit error", "largest logit difference", "same best token"):
        table.add_column(column, justify="right")
    for wire in (Wire.BFLOAT16, Wire.FLOAT8):
        form = WireFormat(wire, checkpoint.config.hidden_size, torch.float32)
        logits_TV = logits_of(checkpoint, wire, token_ids)
        difference_TV = logits_TV - exact_TV
        table.add_row(
            wire.value,
            f"{form.pack(rows_ND).nbytes / len(rows_ND) / (rows_ND.nbytes / len(rows_ND)):.3f} of float32",
            f"{(form.round(rows_ND) - rows_ND).norm() / rows_ND.norm():.4f}",
            f"{difference_TV.norm() / exact_TV.norm():.5f}",
            f"{difference_TV.abs().max():.4f}",
            f"{(logits_TV.argmax(1) == exact_TV.argmax(1)).float().mean():.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
