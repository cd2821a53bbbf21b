"""The attention workers an expert host serves: their links, and what is posted to them. Computes nothing.

A link that fails is dropped, and the others notice nothing: a slow or dead worker costs only its own.
"""

import logging

import torch
from torch import Tensor

from llama4_dist.dispatch.fault_points import FaultPoints
from llama4_dist.dispatch.layout import Groups
from llama4_dist.dispatch.links.hub import Hub
from llama4_dist.dispatch.links.link import Frame, FrameHeader, FrameKind, Link
from llama4_dist.dispatch.links.socket import SocketLink
from llama4_dist.dispatch.links.wire import WireFormat, WireLink
from llama4_dist.dispatch.stats import HostStats
from llama4_dist.dispatch.worker_link import WorkerLink
from llama4_dist.errors import LinkDownError

log = logging.getLogger(__name__)


class WorkerLinks:
    """Links by worker id; `hub` watches their descriptors."""

    def __init__(
        self, hub: Hub, width: int, dtype: torch.dtype, form: WireFormat, stats: HostStats, faults: FaultPoints
    ) -> None:
        self.by_id: dict[str, WorkerLink] = {}
        self._hub = hub
        self._width = width
        self._dtype = dtype
        self._form = form
        self._stats = stats
        self._faults = faults

    def attach(self, link: Link) -> None:
        """Serve a link whose peer is known."""
        self.by_id[link.peer] = WorkerLink(link, self._width, self._dtype)
        self._hub.add(link)
        self._stats.links += 1

    def post(self, worker: WorkerLink, header: FrameHeader, rows_RD: Tensor | None) -> None:
        """Send a frame; a worker that cannot be reached is dropped."""
        try:
            plain = worker.link.inner if isinstance(worker.link, WireLink) else worker.link
            if self._faults.due("half_reply") and isinstance(plain, SocketLink):
                plain.post_half(header, None if rows_RD is None else self._form.pack(rows_RD))
                self._faults.strike()
                return
            link = worker.link
            link.post(header, rows_RD)
            self._faults.hit("replied")
            if link.num_unsent:
                self._hub.watch_sending(link)
        except LinkDownError as error:
            self.drop(worker, error)

    def refuse(self, worker: WorkerLink, frame: Frame, reason: str, groups: Groups) -> None:
        """Let go of a question and tell its worker why it is not answered."""
        self._stats.refusals[reason] += 1
        frame.release()
        self.post(worker, frame.header._replace(kind=FrameKind.NACK, groups=groups, reason=reason), None)

    def drop(self, worker: WorkerLink, error: LinkDownError) -> None:
        """Close one worker's link; the others notice nothing."""
        if self.by_id.get(worker.link.peer) is not worker:
            return
        log.warning("link_closed worker=%s reason=%s", worker.link.peer, error.reason)
        del self.by_id[worker.link.peer]
        self._hub.remove(worker.link)
        worker.link.abort()
        self._stats.closed_links[error.reason] += 1
        self._stats.links -= 1
