"""Runs a gateway over an engine until it is told to stop; the caller owns the engine."""

import asyncio
import gc
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc
from prometheus_client.registry import Collector

from llama4_dist.engine.port import Engine
from llama4_dist.errors import Llama4Error
from llama4_dist.gateway.admission import Admission
from llama4_dist.gateway.engine_ids import EngineIds
from llama4_dist.gateway.generations import Generations, shutting_down
from llama4_dist.gateway.health import Health
from llama4_dist.gateway.metrics import Metrics
from llama4_dist.gateway.observe.engine_collector import EngineCollector
from llama4_dist.gateway.observe.exporter import exporter
from llama4_dist.gateway.server import NO_SERVICES, Services, build_server
from llama4_dist.gateway.service import InferenceService
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.gateway.tokenizer_service import TokenizerService
from llama4_dist.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

READINESS_INTERVAL_S = 0.5
CANCEL_GRACE_S = 1.0  # for calls to read their last status


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gateway:
    """A gateway that serves."""

    port: int
    admission: Admission
    generations: Generations
    health: Health
    metrics: Metrics
    server: grpc.aio.Server
    metrics_port: int | None

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let running ones end for `timeout_s`, then fail the rest as retriable; stop."""
        self.health.set("readiness", False)
        self.admission.draining = True
        log.info("draining requests=%d", self.admission.in_flight)
        try:
            async with asyncio.timeout(timeout_s):
                await self.admission.idle.wait()
        except TimeoutError:
            log.warning("drain_timed_out requests=%d", self.admission.in_flight)
        await self.stop()

    async def stop(self) -> None:
        """Fail what still runs and close."""
        self.health.set("readiness", False)
        self.admission.draining = True
        self.generations.fail_all(shutting_down())
        await self.server.stop(CANCEL_GRACE_S)


@asynccontextmanager
async def running_gateway(
    engine: Engine,
    tokenizer: Tokenizer | None,
    settings: GatewaySettings,
    *,
    extra_services: Services = NO_SERVICES,
    collectors: Iterable[Collector] = (),
) -> AsyncIterator[Gateway]:
    """Start a gateway; stop it on exit. `collectors` add to what it exports."""
    metrics = Metrics([EngineCollector(engine), *collectors])
    admission = Admission(settings.max_requests, time.monotonic, max_queue_s=settings.max_queue_s)
    generations = Generations(engine, tokenizer, metrics, EngineIds(settings.engine_id_key))
    health = Health()
    limits = engine.limits
    server, port = build_server(
        settings,
        inference=InferenceService(
            generations, admission, metrics, settings, limits, has_tokenizer=tokenizer is not None
        ),
        tokenizer=TokenizerService(tokenizer, limits),
        health=health,
        metrics=metrics,
        admission=admission,
        extra_services=extra_services,
    )
    with exporter(metrics.registry, settings.metrics_address, token_file=settings.metrics_token_file) as metrics_port:
        generations.start()
        await server.start()
        health.set("startup", True)
        health.set("readiness", True)
        gateway = Gateway(
            port=port,
            admission=admission,
            generations=generations,
            health=health,
            metrics=metrics,
            server=server,
            metrics_port=metrics_port,
        )
        watch = asyncio.create_task(watch_readiness(engine, gateway, settings))
        log.info("gateway_serving address=%s port=%d model=%s", settings.address, port, limits.model)
        try:
            yield gateway
        finally:
            watch.cancel()
            await gateway.stop()


async def watch_readiness(engine: Engine, gateway: Gateway, settings: GatewaySettings) -> None:
    """Turn readiness off while the engine cannot answer or its queue does not move, and on again.

    A request that ended as unavailable keeps it off for a while: the engine may count well and yet refuse all work.
    """
    loop = asyncio.get_running_loop()
    while True:
        ready = await asyncio.to_thread(can_serve, engine, settings.max_queue_age_s)
        last_s = gateway.generations.last_unavailable_s
        failed_lately = last_s is not None and loop.time() - last_s < settings.unready_after_failure_s
        gateway.health.set("readiness", ready and not failed_lately and not gateway.admission.draining)
        await asyncio.sleep(READINESS_INTERVAL_S)


def can_serve(engine: Engine, max_queue_age_s: float) -> bool:
    """Ask the engine how old its queue is."""
    try:
        return engine.stats().max_queue_age_s <= max_queue_age_s
    except Llama4Error as error:
        log.warning("engine_not_ready reason=%s", error.reason)
    except Exception:  # the watch must outlive a defect, or readiness would freeze
        log.exception("engine_not_ready")
    return False


async def serve(
    engine: Engine,
    tokenizer: Tokenizer | None,
    settings: GatewaySettings,
    *,
    extra_services: Services = NO_SERVICES,
    collectors: Iterable[Collector] = (),
    on_ready: Callable[[Gateway], None] = lambda gateway: None,
) -> None:
    """Serve until SIGTERM or SIGINT: the first drains, a second stops at once."""
    told = asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, told.release)
    try:
        async with running_gateway(
            engine, tokenizer, settings, extra_services=extra_services, collectors=collectors
        ) as gateway:
            with settled_heap():
                on_ready(gateway)
                await told.acquire()
                drain = asyncio.create_task(gateway.drain(settings.drain_timeout_s))
                hurry = asyncio.create_task(told.acquire())
                await asyncio.wait((drain, hurry), return_when=asyncio.FIRST_COMPLETED)
            for task in (drain, hurry):
                task.cancel()
            await asyncio.gather(drain, hurry, return_exceptions=True)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextmanager
def settled_heap() -> Iterator[None]:
    """Keep what was made before serving out of garbage collection, which otherwise walks all of it now and then.

    With torch loaded a full collection stands still for about 70 ms, in which no stream gets a token.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
