"""Who a peer is, and how it proves it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HostIdentity:
    """What an expert host is: its id, which life of it this is, and the model it serves."""

    host: str
    incarnation: int
    model_hash: str
    num_layers: int
    num_experts: int
