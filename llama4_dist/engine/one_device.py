"""The model with all its experts on one CUDA device, for an engine whose experts need no hosts."""

from collections.abc import Callable
from typing import Protocol

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.engine.step import ForwardModel
from llama4_dist.stations import Stations


class MeasuredModel(ForwardModel, Protocol):
    """A model that says where its time goes."""

    stations: Stations


def load_on_one_device(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[MeasuredModel, Dispatcher]:
    """Return the model, and a dispatcher that knows no host: the model asks it for nothing."""
    from llama4_dist.gpu.model import GpuLlama4  # needs Triton, which only this device does

    model = GpuLlama4.load(checkpoint, dtype=dtype, device=device, progress=progress)
    return model, idle_dispatcher(checkpoint.config.hidden_size, dtype=dtype, device=device)


def idle_dispatcher(width: int, *, dtype: torch.dtype, device: str) -> Dispatcher:
    """Return a dispatcher that knows no host, for an engine whose model asks for no rows."""
    table = RoutingTable(epoch=1, replicas={})
    return Dispatcher(worker="local", incarnation=0, table=table, links={}, width=width, dtype=dtype, device=device)
