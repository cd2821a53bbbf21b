"""A store of torch.distributed that is filled by messages between the ranks of a stage, over links that are proved.

`TCPStore` asks nobody for a secret, so ranks meet here instead. What they tell each other, gloo's own addresses, goes
to processes of the group alone. The connections that gloo then makes are not authenticated, see `stages.collective`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import msgpack
from torch._C._distributed_c10d import Store  # that of torch.distributed, as its stubs name it

from llama4_dist.errors import UnavailableError
from llama4_dist.stages.links.defect import defect
from llama4_dist.stages.links.frame import FrameBounds, MessageKind
from llama4_dist.stages.links.link import StageLink
from llama4_dist.stages.ports import TIMEOUT_S

MAX_KEYS = 4096
BOUNDS = FrameBounds(kind=MessageKind.STORE, max_header_bytes=16 * 1024)
_NOTHING = memoryview(b"")


class LinkStore(Store):
    """What one rank sets, all have; a key is set once. `links` are added before anything is set.

    Until `deadline` (of the monotonic clock) the others have to say what is waited for; None = as long as is asked.
    """

    def __init__(self, deadline: float | None = None) -> None:
        super().__init__()
        self.deadline = deadline
        self.links: list[StageLink] = []
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._lost: UnavailableError | None = None

    def deliver(self, header: bytearray, payload_len: int) -> tuple[memoryview, Callable[[], None]]:
        """Take what another rank has set; a link calls it."""
        try:
            key, value = msgpack.unpackb(header, max_map_len=0, max_ext_len=0, max_array_len=2)
        except (ValueError, TypeError, msgpack.UnpackException):
            raise defect("STORE_SHAPE", "what a rank has set is no key with its value") from None
        if type(key) is not str or type(value) is not bytes or len(self._values) >= MAX_KEYS:
            raise defect("STORE_SHAPE", "what a rank has set is no key with its value, or one too many")
        return _NOTHING, lambda: self._keep(key, value)

    def lose(self, error: UnavailableError) -> None:
        """Wake who waits for a key: a rank is gone."""
        with self._changed:
            self._lost = error
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._keep(key, bytes(value))
        header: bytes = msgpack.packb((key, bytes(value)))
        for link in self.links:
            link.send(MessageKind.STORE, header)

    def get(self, key: str) -> bytes:
        self.wait([key], timedelta(seconds=TIMEOUT_S))
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta = timedelta(seconds=TIMEOUT_S)) -> None:
        """Wait for keys; RuntimeError, as torch's own stores raise, when they do not come or a rank is gone."""
        timeout_s = timeout.total_seconds()
        if self.deadline is not None:
            timeout_s = min(timeout_s, max(0.0, self.deadline - time.monotonic()))
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or self._has(keys), timeout_s)
            if not self._has(keys):
                raise RuntimeError(self._lost.message if self._lost is not None else f"nobody has set {keys} in time")

    def check(self, keys: Sequence[str]) -> bool:
        return self._has(keys)

    def _has(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def _keep(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()
