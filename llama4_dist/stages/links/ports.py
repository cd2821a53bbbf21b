"""The three ports of `stages.ports` over links between processes."""

import queue
from collections.abc import Callable

import torch

from llama4_dist.errors import UnavailableError
from llama4_dist.model.batch import Batch
from llama4_dist.stages.links.defect import defect
from llama4_dist.stages.links.frame import MAX_HEADER_BYTES, FrameBounds, MessageKind
from llama4_dist.stages.links.link import Deliver, StageLink
from llama4_dist.stages.links.output_codec import OutputRules, decode_output, encode_output
from llama4_dist.stages.links.plan_codec import PlanRules, decode_plan, encode_plan
from llama4_dist.stages.ports import StageOutput, worker_lost

MAX_QUEUED = 1024  # outputs nobody has taken: parts of a few steps; more is no honest peer
_NOTHING = memoryview(b"")


class PlanEncoder:
    """Encodes a part once for all members; it remembers the last."""

    def __init__(self) -> None:
        self._part: Batch | None = None
        self._bytes = b""

    def encode(self, part: Batch) -> bytes:
        if self._part is not part:
            self._bytes, self._part = encode_plan(part), part
        return self._bytes


class PlanSender:
    """`PlanPort` of a member in another process."""

    def __init__(self, link: StageLink, encoder: PlanEncoder) -> None:
        self._link = link
        self._encoder = encoder

    def submit(self, part: Batch) -> None:
        self._link.send(MessageKind.PLAN, self._encoder.encode(part))


def plan_bounds() -> FrameBounds:
    """Return what a member takes from its leader."""
    return FrameBounds(kind=MessageKind.PLAN, max_header_bytes=MAX_HEADER_BYTES)


def deliver_plans(rules: PlanRules, device: torch.device | str, take: Callable[[Batch], None]) -> Deliver:
    """Return what hands a member its parts."""

    def deliver(header: bytearray, payload_len: int) -> tuple[memoryview, Callable[[], None]]:
        part = decode_plan(header, rules, device=device)
        return _NOTHING, lambda: take(part)

    return deliver


class OutputSender:
    """`Outlet` to a process."""

    def __init__(self, link: StageLink) -> None:
        self._link = link

    def put(self, output: StageOutput) -> None:
        self._link.send(MessageKind.OUTPUT, *encode_output(output))


class OutputInlet:
    """`Inlet` from a process; `deliver` and `lose` are the link's to call."""

    def __init__(self, rules: OutputRules, device: torch.device | str) -> None:
        self.bounds = FrameBounds(kind=MessageKind.OUTPUT, max_payload_bytes=rules.max_payload_bytes)
        self._rules = rules
        self._device = device
        self._queue: queue.SimpleQueue[StageOutput | UnavailableError] = queue.SimpleQueue()

    def deliver(self, header: bytearray, payload_len: int) -> tuple[memoryview, Callable[[], None]]:
        if self._queue.qsize() >= MAX_QUEUED:
            raise defect("QUEUE_FULL", f"{MAX_QUEUED} outputs came that nobody waits for")
        read = decode_output(header, payload_len, self._rules)
        return read.payload, lambda: self._queue.put(read.output(self._device))

    def lose(self, error: UnavailableError) -> None:
        """Tell who takes, now and later, that nothing more comes."""
        self._queue.put(error)

    def take(self, timeout_s: float) -> StageOutput:
        try:
            output = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            raise worker_lost(f"a stage said nothing for {timeout_s:g} s") from None
        if isinstance(output, UnavailableError):
            self._queue.put(output)  # the next to ask is told too
            raise output
        return output
