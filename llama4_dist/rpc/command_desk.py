"""Carries out what gateways ask of an engine, and sends outputs to whom they belong; knows no gRPC call.

A command that cannot be answered yet waits here: its request may belong to a stream that broke unnoticed.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from llama4_dist.engine.port import Engine, unknown_request
from llama4_dist.errors import DuplicateRequestError, Llama4Error
from llama4_dist.internal.v1 import engine_pb2 as pb
from llama4_dist.request import FinishReason, TokenOutput
from llama4_dist.rpc import engine_wire as wire
from llama4_dist.rpc.request_ledger import Claim, RequestLedger
from llama4_dist.rpc.run_stream import RunStream

log = logging.getLogger(__name__)

MAX_WAIT_S = 1.0  # for a stream to be noticed broken; a killed process is noticed at once


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingCommand:
    """A submit or attach that is asked again until it can be answered."""

    stream: RunStream
    command: pb.RunRequest
    request_id: str
    deadline_s: float


class CommandDesk:
    """Submits, attaches and aborts; used by a thread per stream, the engine's own, and a sweeper."""

    def __init__(self, engine: Engine, ledger: RequestLedger) -> None:
        self._engine = engine
        self._ledger = ledger
        self._waiting: list[WaitingCommand] = []
        self._lock = threading.Lock()

    def obey(self, stream: RunStream, command: pb.RunRequest) -> None:
        """Carry out one command, now or as soon as it can be."""
        if command.HasField("abort"):
            self._abort(stream, command.abort.request_id)
        elif command.HasField("submit") or command.HasField("attach"):
            request_id = command.submit.request_id if command.HasField("submit") else command.attach.request_id
            deadline_s = time.monotonic() + MAX_WAIT_S
            self._try(WaitingCommand(stream=stream, command=command, request_id=request_id, deadline_s=deadline_s))

    def deliver(self, outputs: Sequence[TokenOutput]) -> None:
        """Split one step's outputs by stream; runs on the engine's thread, so it never waits."""
        with self._lock:
            for stream, mine in self._ledger.take(outputs).items():
                stream.send(mine)

    def leave(self, stream: RunStream) -> None:
        """Let go of everything a stream had; harmless twice."""
        with self._lock:
            self._waiting = [waiting for waiting in self._waiting if waiting.stream is not stream]
            aborted = self._ledger.leave(stream)
        for request_id in aborted:
            self._engine.abort(request_id)

    def sweep(self) -> None:
        """Abort orphans whose time is over, and ask again for what waits."""
        with self._lock:
            expired = self._ledger.expire()
            waiting, self._waiting = self._waiting, []
        for request_id in expired:
            log.info("orphan_expired id=%s", request_id)
            self._engine.abort(request_id)
        for one in waiting:
            self._try(one)

    def _try(self, one: WaitingCommand) -> None:
        claim = self._submit(one) if one.command.HasField("submit") else self._attach(one)
        if claim is Claim.EVICT:
            self._engine.abort(one.request_id)
        if claim not in (Claim.WAIT, Claim.EVICT):
            return
        with self._lock:
            if one.stream.ended.is_set():
                return
            if time.monotonic() < one.deadline_s:
                self._waiting.append(one)
                return
        self._refuse(one)

    def _submit(self, one: WaitingCommand) -> Claim:
        request = wire.request_from_wire(one.command.submit)
        with self._lock:
            if one.stream.ended.is_set():
                return Claim.REFUSED  # nobody would let go of it
            claim = self._ledger.submit(request, one.stream)
        if claim is Claim.REFUSED:
            self._refuse(one)
        if claim is Claim.NEW:
            try:
                self._engine.submit(request)  # claimed before: the first output may come at once
            except Llama4Error as error:
                with self._lock:
                    self._ledger.forget(one.request_id)
                one.stream.send([TokenOutput(request_id=one.request_id, error=error)])
        return claim

    def _attach(self, one: WaitingCommand) -> Claim:
        with self._lock:
            if one.stream.ended.is_set():
                return Claim.REFUSED
            claim = self._ledger.attach(one.request_id, one.command.attach.digest, one.stream)
        if claim is Claim.REFUSED:
            self._refuse(one)
        return claim

    def _refuse(self, one: WaitingCommand) -> None:
        taken = DuplicateRequestError(f"a request with id {one.request_id!r} is running: choose another id")
        error = taken if one.command.HasField("submit") else unknown_request()
        one.stream.send([TokenOutput(request_id=one.request_id, error=error)])

    def _abort(self, stream: RunStream, request_id: str) -> None:
        with self._lock:
            kept = [one for one in self._waiting if one.request_id != request_id or one.stream is not stream]
            waited = len(kept) < len(self._waiting)
            self._waiting = kept
            allowed = self._ledger.abort(request_id, stream)
        if allowed:  # a gateway cannot end what another one runs
            self._engine.abort(request_id)
        if waited:
            stream.send([TokenOutput(request_id=request_id, finish_reason=FinishReason.CANCELLED)])
