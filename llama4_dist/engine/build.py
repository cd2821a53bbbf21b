"""Puts an engine together: checkpoint, model, experts and dispatcher in one process. Never imports Ray."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.engine import kv_sizing
from llama4_dist.engine.apart import apart
from llama4_dist.engine.devices import load_model
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.inproc_hosts import start_inproc_hosts
from llama4_dist.engine.inproc_members import start_inproc_members
from llama4_dist.engine.kv_dtype import resolve_kv_dtype
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.members_plan import MembersPlan, plan_members
from llama4_dist.engine.memory import memory_bytes
from llama4_dist.engine.one_device import MeasuredModel, idle_dispatcher, load_on_one_device
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import ConfigError
from llama4_dist.model.cpu.panels import is_native
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.residency import check_residency
from llama4_dist.model.weight_format import STORED, check_weight_format
from llama4_dist.native import threads
from llama4_dist.partition import WHOLE, Partition
from llama4_dist.request import EngineLimits
from llama4_dist.stages.pipeline import PipelinedModel

Progress = Callable[[int, int], None]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, stored: str) -> torch.dtype:
    """Return the torch dtype of a name; "auto" is the dtype the checkpoint was stored in."""
    resolved = stored if name == "auto" else name
    if resolved not in _DTYPES:
        raise ConfigError(f"dtype={name!r} is none of auto, {', '.join(_DTYPES)}")
    return _DTYPES[resolved]


@apart
def build_engine(
    checkpoint: Checkpoint,
    dispatcher: Dispatcher,
    *,
    options: EngineOptions,
    dtype: torch.dtype,
    device: str = "cpu",
    weights: str = STORED,
    local_hosts: Sequence[ExpertServer] = (),
    progress: Progress | None = None,
) -> LocalEngine:
    """Load the attention side of a checkpoint and return an engine that reaches experts through `dispatcher`.

    `weights` is the format of linear weights, "stored" or "int8" (`model.weight_format`); the experts must have it too.
    """
    resolve_kv_dtype(options.kv_dtype, compute_dtype=dtype, device=device)  # refused before weights are read
    model = load_model(checkpoint, dtype=dtype, device=device, weight_format=weights, progress=progress)
    if is_native(dtype, device):
        threads.leave_to_native()
    engine = assemble(checkpoint, model, dispatcher, options=options, dtype=dtype, device=device)
    engine.core.runner.local_hosts = local_hosts
    return engine


def assemble(
    checkpoint: Checkpoint,
    model: MeasuredModel,
    dispatcher: Dispatcher,
    *,
    options: EngineOptions,
    dtype: torch.dtype,
    device: str = "cpu",
    cache: KVCache | None = None,
) -> LocalEngine:
    """Return an engine over a model that is loaded; its cache takes a share of the memory that is free now.

    A leader passes its own `cache`, in which pages are only counted.
    """
    if cache is None:
        cache = _whole_cache(checkpoint, options, dtype=dtype, device=device)
    config = checkpoint.config
    limits = EngineLimits(
        model=options.model_name or checkpoint.path.name,
        vocab_size=config.vocab_size,
        max_context=kv_sizing.longest_sequence(
            cache.layout, cache.num_pages, options.block_size, at_most=kv_sizing.wanted_context(config, options)
        ),
        max_waiting=options.max_waiting,
    )
    core = EngineCore(
        model,
        cache,
        dispatcher,
        limits=limits,
        options=replace(options, num_blocks=cache.num_pages),
        eos_token_ids=checkpoint.generation.eos_token_ids or config.eos_token_ids,
        device=device,
    )
    model.stations = core.counters.stations
    return LocalEngine(core)


def lead(
    checkpoint: Checkpoint,
    model: PipelinedModel,
    plan: MembersPlan,
    *,
    options: EngineOptions,
    device: str = "cpu",
) -> LocalEngine:
    """Return the engine of a group's leader, which plans and samples, and holds neither layers nor keys."""
    dispatcher = idle_dispatcher(checkpoint.config.hidden_size, dtype=plan.dtype, device=device)
    cache = plan.cache(checkpoint, None, device=device)
    return assemble(checkpoint, model, dispatcher, options=options, dtype=plan.dtype, device=device, cache=cache)


@apart
def build_single_process(  # noqa: PLR0913 - the settings of an engine, all by name
    model_dir: Path,
    *,
    dtype: str = "auto",
    weights: str = STORED,
    device: str = "cpu",
    num_inproc_hosts: int = 1,
    expert_slices: int = 1,
    expert_memory_bytes: int | None = None,
    options: EngineOptions | None = None,
    num_threads: int | None = None,
    partition: Partition = WHOLE,
    progress: Progress | None = None,
) -> LocalEngine:
    """Open a checkpoint and return an engine whose experts live in this process, behind inproc links.

    `expert_slices` cuts every expert as a cluster of so many would: tokens have its bits. `expert_memory_bytes` is how
    much of the experts stays in memory (`model.residency`). On a CUDA device with one host and whole experts these need
    no links: they are the model's own (`llama4_dist.gpu`). With a `partition` of several stages or ranks each member is
    a thread with expert hosts of its own, and a part of that memory. Raises ConfigError for a name or a value that
    cannot be computed here.
    """
    if num_threads is not None:
        threads.set_count(num_threads)
    with ExitStack() as resources:
        checkpoint = Checkpoint.open(Path(model_dir))
        resources.callback(checkpoint.close)
        torch_dtype = resolve_dtype(dtype, checkpoint.config.dtype)
        check_weight_format(weights, dtype=torch_dtype, device=device)
        options = options or EngineOptions()
        if partition != WHOLE:
            plan = plan_members(
                checkpoint,
                partition,
                options,
                dtype=torch_dtype,
                device=device,
                memory_bytes=memory_bytes(device) // partition.num_members,
            )
            if is_native(torch_dtype, device):
                threads.leave_to_native()
            start_hosts = partial(
                start_inproc_hosts,
                checkpoint,
                num_hosts=num_inproc_hosts,
                dtype=torch_dtype,
                device=device,
                weights=weights,
                resources=resources,
                num_slices=expert_slices,
                memory_bytes=None if expert_memory_bytes is None else expert_memory_bytes // partition.num_members,
            )
            pipelined = start_inproc_members(
                checkpoint,
                plan,
                start_hosts,
                device=device,
                weights=weights,
                resources=resources,
                progress=progress,
            )
            engine = lead(checkpoint, pipelined, plan, options=options, device=device)
        elif torch.device(device).type == "cuda" and num_inproc_hosts == expert_slices == 1:
            if expert_memory_bytes is not None:
                check_residency(
                    expert_memory_bytes, checkpoint, dtype=torch_dtype, device=device, weight_format=weights
                )
            model, dispatcher = load_on_one_device(checkpoint, dtype=torch_dtype, device=device, progress=progress)
            resources.callback(dispatcher.close)
            engine = assemble(checkpoint, model, dispatcher, options=options, dtype=torch_dtype, device=device)
        else:
            dispatcher, servers = start_inproc_hosts(
                checkpoint,
                num_hosts=num_inproc_hosts,
                dtype=torch_dtype,
                device=device,
                weights=weights,
                num_slices=expert_slices,
                memory_bytes=expert_memory_bytes,
                resources=resources,
            )
            engine = build_engine(
                checkpoint,
                dispatcher,
                options=options,
                dtype=torch_dtype,
                device=device,
                weights=weights,
                local_hosts=servers,
                progress=progress,
            )
        engine.on_close = resources.pop_all().close
    return engine


def _whole_cache(checkpoint: Checkpoint, options: EngineOptions, *, dtype: torch.dtype, device: str) -> KVCache:
    config = checkpoint.config
    kv_dtype = resolve_kv_dtype(options.kv_dtype, compute_dtype=dtype, device=device)
    num_pages = kv_sizing.num_pages(config, options, dtype_bytes=kv_dtype.itemsize, memory_bytes=memory_bytes(device))
    return KVCache(
        config,
        num_pages=num_pages,
        block_size=options.block_size,
        dtype=kv_dtype,
        device=device,
        compute_dtype=dtype,
        model_hash=checkpoint.model_hash,
    )
