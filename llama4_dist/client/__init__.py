"""Python clients of a gateway; need neither torch nor Ray."""

from llama4_dist.client.aio import AsyncClient
from llama4_dist.client.options import ConnectOptions
from llama4_dist.client.results import Delta, ModelCard
from llama4_dist.client.sync import Client

__all__ = ["AsyncClient", "Client", "ConnectOptions", "Delta", "ModelCard"]
