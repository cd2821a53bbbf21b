"""The gateways a client may call, one of them at a time; blocking and asyncio channels alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpc_health.v1 import health_pb2_grpc

from llama4_dist.errors import ConfigError
from llama4_dist.v1 import inference_pb2_grpc, tokenizer_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Endpoint:
    """One gateway."""

    channel: Any
    inference: Any
    tokenizer: Any
    health: Any


class Endpoints:
    """All gateways of a client; `current` serves until it fails. Channels connect when they are first used."""

    def __init__(self, address: str | Sequence[str], open_channel: Callable[[str], Any]) -> None:
        self.all = tuple(endpoint(open_channel(one)) for one in addresses_of(address))
        self._num_passed = 0

    def __len__(self) -> int:
        return len(self.all)

    @property
    def current(self) -> Endpoint:
        return self.all[self._num_passed % len(self.all)]

    def pass_over(self, failed: Endpoint) -> None:
        """Turn to the next gateway, unless another call has done so already."""
        if failed is self.current:
            self._num_passed += 1


def endpoint(channel: Any) -> Endpoint:
    """Build the stubs of a channel."""
    return Endpoint(
        channel=channel,
        inference=inference_pb2_grpc.InferenceServiceStub(channel),  # type: ignore[no-untyped-call]
        tokenizer=tokenizer_pb2_grpc.TokenizerServiceStub(channel),  # type: ignore[no-untyped-call]
        health=health_pb2_grpc.HealthStub(channel),
    )


def addresses_of(address: str | Sequence[str]) -> tuple[str, ...]:
    """Read "host:port,host:port" or a sequence of addresses."""
    parts = address.split(",") if isinstance(address, str) else address
    found = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not found:
        raise ConfigError(f"address {address!r} names no gateway: give host:port, several separated by commas")
    return found
