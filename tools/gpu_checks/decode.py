"""Times decode of a stack in Scout's shape, and the same few layers beside transformers on the same card."""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gpu_checks.harness import Session, replay_seconds
from gpu_checks.stack import BLOCK_SIZE, layer_bytes, make_batch, make_cache, random_model, scout_config
from llama4_dist.config import ModelConfig
from llama4_dist.gpu import layer as gpu_layer
from llama4_dist.gpu.model import GpuLlama4
from llama4_dist.gpu.packed import FORMATS, Packed
from llama4_dist.gpu.row_kernels import add_norm_and_route
from llama4_dist.gpu.weights import LayerWeights, ModelWeights
from llama4_dist.model.batch import Batch
from llama4_dist.model.kv_cache import KVCache

CONTEXT = 1024
JUDGED_LAYERS = 4  # whose logits are compared in float32
FEW_LAYERS = 12  # timed beside transformers, which keeps its own copy of them
BATCHES = 8  # whose steps are timed in turn, so that experts change
QUANTIZED_LAYERS = 8  # enough that weights are no longer in the cache when they are read again
RESERVED_BYTES = 10 << 30  # for the cache, logits, and what torch keeps


def check_decode(session: Session) -> None:
    """Decode at batch 1: active weight bytes over step time, against the copy rate."""
    free = torch.cuda.mem_get_info(session.device)[0] - RESERVED_BYTES
    config = scout_config(1)
    ends = 2 * 2 * config.vocab_size * config.hidden_size
    num_layers = int((min(free, session.stack_bytes) - ends) // layer_bytes(config))
    for expert_format in FORMATS:
        layers = num_layers if expert_format == "stored" else min(num_layers, QUANTIZED_LAYERS)
        _time_stack(session, scout_config(layers), expert_format)
        gc.collect()
        torch.cuda.empty_cache()


def _time_stack(session: Session, config: ModelConfig, expert_format: str) -> None:
    model = random_model(config, session.device, expert_format=expert_format)
    active = config.num_layers * layer_bytes(config, experts=1, expert_format=expert_format)
    active += 2 * config.vocab_size * config.hidden_size
    cache = _random_cache(model, 64)
    is_stored = expert_format == "stored"
    for num_sequences in (1, 4, 16, 64) if is_stored else (1,):
        step_s, replay_s = _decode_seconds(model, cache, num_sequences)
        name = f"decode, {config.num_layers} layers of Scout, {expert_format}, batch {num_sequences}"
        note = f"{num_sequences / step_s:.0f} token/s, step with host {step_s * 1e6:.0f} us"
        if num_sequences > 1:
            per_layer = _experts_per_layer(model, cache, num_sequences)
            num_bytes = active + config.num_layers * (per_layer - 1) * 3 * 2 * config.hidden_size * config.expert_width
            session.add(
                name,
                "measured",
                seconds=replay_s,
                rate=f"{num_bytes / replay_s / 1e12:.2f} TB/s",
                share=num_bytes / replay_s / session.copy_rate,
                note=f"{per_layer:.1f} routed experts a layer; {note}",
            )
            continue
        rate = active / replay_s
        share = rate / session.copy_rate
        session.add(
            name,
            share >= 0.75 if is_stored else "measured",
            seconds=replay_s,
            rate=f"{rate / 1e12:.2f} TB/s",
            share=share,
            note=f"wanted of stored: 75 %; context {CONTEXT}, active {active / 1e9:.1f} GB; {note}",
        )
    for num_tokens in (512, 2048) if is_stored else (2048,):
        _time_prefill(session, model, cache, num_tokens, expert_format)


def _experts_per_layer(model: GpuLlama4, cache: KVCache, num_sequences: int) -> float:
    """Return how many routed experts a layer of the batch timed last reads, on average."""
    counts: list[int] = []

    def counting(*arguments: Any, experts_N: Tensor, **others: Any) -> None:
        add_norm_and_route(*arguments, experts_N=experts_N, **others)
        counts.append(len(experts_N[: len(arguments[0])].unique()))

    with patch.object(gpu_layer, "add_norm_and_route", counting):
        plain = GpuLlama4(model.config, model.weights, use_graphs=False)
        plain.forward(_decode_batch(model, num_sequences, BATCHES - 1), cache)
    return sum(counts) / len(counts)


def _time_prefill(session: Session, model: GpuLlama4, cache: KVCache, num_tokens: int, expert_format: str) -> None:
    config = model.config
    tokens = torch.randint(0, config.vocab_size, (num_tokens,)).tolist()
    batch = make_batch(model, [(tokens, 0, range(CONTEXT * 2 // BLOCK_SIZE))])
    batch = Batch(step=1, token_ids_T=batch.token_ids_T, spans=batch.spans, logit_rows=(num_tokens - 1,))
    seconds = _host_seconds(lambda: model.forward(batch, cache), 4)
    operations = num_tokens * config.num_layers * layer_bytes(config, experts=1)  # 2 a parameter of 2 bytes
    session.add(
        f"prefill, {config.num_layers} layers of Scout, {expert_format}, {num_tokens} tokens",
        "measured",
        seconds=seconds,
        rate=f"{operations / seconds / 1e12:.0f} TFLOP/s",
        share=operations / seconds / session.matrix_rate,
        note=f"{num_tokens / seconds:.0f} token/s",
    )


def check_batches(session: Session) -> None:
    """A row of Scout's own shapes: the same bits at every batch size."""
    model = random_model(scout_config(2), session.device)
    cache = _random_cache(model, 64)
    tokens = torch.randint(0, model.config.vocab_size, (64,)).tolist()
    alone_1V = model.forward(make_batch(model, [_part(tokens[0], 0)]), cache)
    for num_sequences in (2, 3, 16, 33, 64):
        batch = make_batch(model, [_part(token, index) for index, token in enumerate(tokens[:num_sequences])])
        same = torch.equal(model.forward(batch, cache)[:1], alone_1V)
        session.add(f"Scout's layers, batch {num_sequences}: row 0 has the bits of batch 1", same)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, model.config.vocab_size, (600,), generator=generator).tolist()
    blocks = range(CONTEXT // BLOCK_SIZE)
    whole_TV = model.forward(make_batch(model, [(prompt, 0, blocks)]), cache)[-8:]
    model.forward(make_batch(model, [(prompt[:592], 0, blocks)]), cache)
    decoded_TV = torch.cat(
        [model.forward(make_batch(model, [([prompt[i]], i, blocks)]), cache) for i in range(592, 600)]
    )
    note = f"largest difference {float((whole_TV - decoded_TV).abs().max()):.1e}"
    session.add("Scout's layers: decode is prefill", torch.equal(whole_TV, decoded_TV), note=note)


def check_transformers(session: Session) -> None:
    """The same weights in transformers: its logits, and its time for a decode step at batch 1."""
    if importlib.util.find_spec("transformers") is None:
        session.add("decode beside transformers", "skipped", note="transformers is not installed")
        return
    _judge_logits(session)
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(session.device)[0] - RESERVED_BYTES
    num_layers = min(FEW_LAYERS, int(free // (2.3 * layer_bytes(scout_config(1)))))
    _compare_times(session, num_layers)


def _judge_logits(session: Session) -> None:
    """Both in bfloat16 against transformers in float32, on the same weights: ours may be no further off than theirs.

    Rounding sends a token with two nearly equal experts to the other one now and then, in both: so the median row.
    """
    config = scout_config(JUDGED_LAYERS)
    theirs = _transformers_model(config, session.device)
    ours = GpuLlama4(config, _weights_of(theirs))
    tokens = torch.randint(0, config.vocab_size, (1, 128), device=session.device)
    cache = make_cache(config, CONTEXT, session.device, torch.bfloat16)
    blocks = range(CONTEXT // BLOCK_SIZE)
    with torch.inference_mode():
        ours_TV = ours.forward(make_batch(ours, [(tokens[0].tolist(), 0, blocks)]), cache)
        theirs_TV = theirs(tokens).logits[0].float()
        del ours
        expected_TV = theirs.float()(tokens).logits[0]
    (error, far), (their_error, their_far) = (_row_errors(x_TV, expected_TV) for x_TV in (ours_TV, theirs_TV))
    session.add(
        f"logits of {JUDGED_LAYERS} layers of Scout, against transformers in float32, median row",
        error <= 1.2 * their_error,
        error=error,
        note=f"transformers in bfloat16 {their_error:.2e}; rows further than 0.1: {far:.0%}, theirs {their_far:.0%}",
    )


def _row_errors(out_TV: Tensor, expected_TV: Tensor) -> tuple[float, float]:
    """Return the median relative error of a row, and the share of rows further off than 0.1."""
    errors_T = (out_TV - expected_TV).norm(dim=1) / expected_TV.norm(dim=1)
    return float(errors_T.median()), float((errors_T > 0.1).float().mean())


def _compare_times(session: Session, num_layers: int) -> None:
    theirs = _transformers_model(scout_config(num_layers), session.device)
    ours = GpuLlama4(scout_config(num_layers), _weights_of(theirs))
    tokens = torch.randint(0, ours.config.vocab_size, (1, 129), device=session.device)
    with torch.inference_mode():
        past = theirs(tokens[:, :128], use_cache=True).past_key_values
        step = tokens[:, 128:]
        theirs_s = _host_seconds(lambda: theirs(step, past_key_values=past, use_cache=True), 12)
    cache = make_cache(ours.config, CONTEXT, session.device, torch.bfloat16)
    ours_s, replay_s = _decode_seconds(ours, cache, 1, context=129)
    ratio = theirs_s / ours_s
    session.add(
        f"decode step of {num_layers} layers beside transformers",
        ratio >= 10,
        seconds=ours_s,
        note=f"wanted: 10 times; theirs {theirs_s * 1e6:.0f} us, {ratio:.1f} times; our graph {replay_s * 1e6:.0f} us",
    )


def _transformers_model(config: ModelConfig, device: torch.device) -> Any:
    """Return transformers' model of this geometry in bfloat16, weights with a standard deviation of 1/sqrt(fan in)."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    before_5: dict[str, Any] = {"rope_theta": config.rope_theta}  # where older transformers look for it
    text_config = Llama4TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_width,
        intermediate_size_mlp=config.dense_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_local_experts=config.num_experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        attention_chunk_size=config.chunk_size,
        **before_5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": config.rope_theta,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        floor_scale=int(config.floor_scale),
        attn_scale=config.attn_scale,
        max_position_embeddings=config.max_position_embeddings,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Llama4ForCausalLM(text_config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=(parameter.shape[1] if "experts." in name else parameter.shape[-1]) ** -0.5)
    return model


def _weights_of(theirs: Any) -> ModelWeights:
    """Lay transformers' weights out for the kernels."""

    def linear(*weights: Tensor) -> Packed:
        return Packed(values_EFD=torch.cat([weight.data for weight in weights])[None])

    layers = []
    for layer in theirs.model.layers:
        attention, moe = layer.self_attn, layer.feed_forward
        shared = moe.shared_expert
        gate_up = torch.cat([shared.gate_proj.weight.data, shared.up_proj.weight.data])
        layers.append(
            LayerWeights(
                input_norm_D=layer.input_layernorm.weight.data,
                qkv=linear(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
                o=linear(attention.o_proj.weight),
                post_attention_norm_D=layer.post_attention_layernorm.weight.data,
                router_ED=moe.router.weight.data,
                gate_up=Packed(values_EFD=torch.cat([moe.experts.gate_up_proj.data.mT, gate_up[None]])),
                down=Packed(values_EFD=torch.cat([moe.experts.down_proj.data.mT, shared.down_proj.weight.data[None]])),
            )
        )
    return ModelWeights(
        embedding_VD=theirs.model.embed_tokens.weight.data,
        layers=tuple(layers),
        norm_D=theirs.model.norm.weight.data,
        head=linear(theirs.lm_head.weight),
    )


def _random_cache(model: GpuLlama4, num_sequences: int) -> KVCache:
    cache = make_cache(model.config, num_sequences * CONTEXT, model.device, torch.bfloat16)
    for layer in range(model.config.num_layers):
        for slots_SD in cache.slots(layer):
            slots_SD.normal_()
    return cache


def _part(token: int, sequence: int, context: int = CONTEXT) -> tuple[list[int], int, range]:
    blocks = CONTEXT // BLOCK_SIZE
    return [token], context - 1, range(sequence * blocks, (sequence + 1) * blocks)


def _decode_batch(model: GpuLlama4, num_sequences: int, index: int, context: int | None = None) -> Batch:
    """Return one token for each sequence, other ones for each index."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, model.config.vocab_size, (num_sequences,), generator=generator).tolist()
    parts = [_part(token, sequence, context or CONTEXT) for sequence, token in enumerate(tokens)]
    return make_batch(model, parts)


def _decode_seconds(
    model: GpuLlama4, cache: KVCache, num_sequences: int, context: int = CONTEXT
) -> tuple[float, float]:
    """Return seconds of a step, host and all, and of its graph alone; other tokens, so other experts, each step."""
    batches = [_decode_batch(model, num_sequences, index, context) for index in range(BATCHES)]
    turns = iter(range(1 << 30))
    step_s = _host_seconds(lambda: model.forward(batches[next(turns) % BATCHES], cache), 3 * BATCHES - 2)
    graphs = model._graphs
    assert graphs is not None
    graph = next(reversed(graphs._graphs.values())).graph
    return step_s, replay_seconds(graph, 10)


def _host_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the median wall-clock seconds of a call and what it started on the device."""
    times = []
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    for _ in range(repeats):
        started_s = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)
