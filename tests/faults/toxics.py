"""What may be done to one direction of a connection, and what was done so far; plain data, no sockets."""

from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """Which way bytes go through a proxy."""

    TO_SERVER = "to_server"
    TO_CLIENT = "to_client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Toxics:
    """What happens to bytes; the default is nothing. Changes apply to bytes that arrive later.

    `delay_s` holds each byte back, plus up to `jitter_s` more, in order. `bytes_per_s` limits the rate. `slice_bytes`
    sends no more at a time. `corrupt_every` k flips one bit in every k-th byte. `blackhole` reads and forwards nothing;
    what waits arrives when it ends, as after a partition. `silent_after` n forwards n more bytes of each connection,
    then nothing. `drop_after` n forwards n more, then resets the connection.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float | None = None
    slice_bytes: int | None = None
    corrupt_every: int | None = None
    blackhole: bool = False
    silent_after: int | None = None
    drop_after: int | None = None

    def __post_init__(self) -> None:
        for name in ("bytes_per_s", "slice_bytes", "corrupt_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive; None switches it off")
        for name in ("delay_s", "jitter_s", "silent_after", "drop_after"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} is negative")


NONE = Toxics()


@dataclass(slots=True, kw_only=True)
class Counters:
    """Of one direction, over all connections since the proxy began; bytes unless the name says otherwise."""

    read: int = 0
    passed: int = 0
    held: int = 0  # read or waiting to be read, and not yet passed; of connections that are open
    delayed: int = 0  # passed after at least `delay_s` of those toxics that were on when they came
    corrupted: int = 0
    dropped: int = 0  # read and thrown away: after a half-close, in a connection that was reset, by `drop_after`
    num_sends: int = 0
    num_cut: int = 0  # connections that `silent_after` or `drop_after` cut
