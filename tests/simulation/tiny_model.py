"""A model in whole numbers: every token depends on every row of every expert and on the whole cached context.

A row that is wrong, missing, doubled, swapped or stale changes the tokens, and so does a cache block of somebody else.
All values are integers below 2**24, hence exact in float32 in any order. It knows no host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.options import EngineOptions
from llama4_dist.errors import Llama4Error
from llama4_dist.model.batch import Batch, SequenceSpan
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import KVGroup, KVLayout
from llama4_dist.request import EngineLimits, EngineRequest, FinishReason, Sampling

MODULUS = 101
WIDTH = 8  # D
NUM_LAYERS = 2
NUM_EXPERTS = 4
NUM_SLOTS = 2  # K
VOCAB_SIZE = 97
EOS = 96
BLOCK_SIZE = 2
LAYOUT = KVLayout(groups=(KVGroup(layers=(0,), chunk_size=None),))

Numbers = NDArray[np.int64]

_TOKENS_VD: Numbers = (np.arange(VOCAB_SIZE)[:, None] * (np.arange(WIDTH) * 2 + 3) + np.arange(WIDTH) ** 2) % MODULUS
_HEAD_D: Numbers = np.arange(WIDTH) * 5 + 1
_DISTANCES = (np.arange(VOCAB_SIZE)[None, :] - np.arange(VOCAB_SIZE)[:, None]) % VOCAB_SIZE
_LOGITS_VV = torch.from_numpy(_DISTANCES).float() / -2  # row t: the likeliest token is t, then t + 1, …


def expert_rows(layer: int, expert: int, x_RD: Numbers) -> Numbers:
    """What an expert makes of its rows: not linear, and of neighbouring columns."""
    y_RD = x_RD * x_RD + (3 + 7 * layer + 11 * expert) * x_RD + (5 + layer) * np.roll(x_RD, 1, axis=1) + 13 * expert
    return cast(Numbers, y_RD % MODULUS)


def compute(layer: int, groups: Sequence[tuple[int, int]], x_RD: Tensor, out_RD: Tensor) -> None:
    """Run groups of rows through their experts."""
    rows, out, start = x_RD.numpy().astype(np.int64), out_RD.numpy(), 0
    for expert, count in groups:
        out[start : start + count] = expert_rows(layer, expert, rows[start : start + count])
        start += count
    assert start == len(rows), "groups do not cover the rows"


def referee(layer: int, expert: int, x_RD: Tensor) -> Tensor:
    """Satisfies `cross_check.Referee`."""
    out_RD = torch.empty_like(x_RD)
    compute(layer, ((expert, len(x_RD)),), x_RD, out_RD)
    return out_RD


class TinyModel:
    """Two layers of attention and experts, and a last look at the whole context."""

    def __init__(self, num_blocks: int) -> None:
        self._caches = np.zeros((NUM_LAYERS + 1, num_blocks * BLOCK_SIZE, WIDTH), dtype=np.int64)

    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor:
        dispatcher.begin_step(batch.step)
        slots = [_slots(span) for span in batch.spans]
        h_TD = _TOKENS_VD[batch.token_ids_T.numpy()]
        for layer in range(NUM_LAYERS):
            h_TD = self._attend(layer, h_TD, batch.spans, slots)
            in_flight = dispatcher.dispatch(layer, torch.from_numpy(h_TD.astype(np.float32)), *_route(layer, h_TD))
            shared_TD = 7 * h_TD + layer + 1
            y_TD = dispatcher.combine(in_flight).numpy().astype(np.int64)
            h_TD = (h_TD + 3 * y_TD + shared_TD) % MODULUS
        h_TD = self._attend(NUM_LAYERS, h_TD, batch.spans, slots)
        return _LOGITS_VV[(h_TD[list(batch.logit_rows)] @ _HEAD_D) % (VOCAB_SIZE - 1)]

    def _attend(self, layer: int, h_TD: Numbers, spans: Sequence[SequenceSpan], slots: Sequence[Numbers]) -> Numbers:
        """Add to each row a sum over its sequence's rows up to it, each weighted by its position."""
        cache, seen, start = self._caches[layer], [], 0
        for span, slots_S in zip(spans, slots, strict=True):
            stop = start + span.num_tokens
            cache[slots_S[span.num_cached :]] = h_TD[start:stop]
            weighted_SD = cache[slots_S] * (1 + 3 * np.arange(len(slots_S)))[:, None]
            seen.append(weighted_SD.cumsum(axis=0)[span.num_cached :])
            start = stop
        attended_TD: Numbers = (h_TD + np.concatenate(seen)) % MODULUS
        return attended_TD


def _slots(span: SequenceSpan) -> Numbers:
    slots = np.asarray(span.pages[0].ids)[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
    return slots.reshape(-1)[: span.num_cached + span.num_tokens]


def _route(layer: int, h_TD: Numbers) -> tuple[Tensor, Tensor]:
    """Choose two experts and two scores per token, all of them from what the token has become."""
    first_T = (h_TD[:, 0] + 2 * h_TD[:, 1] + layer) % NUM_EXPERTS
    second_T = (first_T + 1 + h_TD[:, 2] % (NUM_EXPERTS - 1)) % NUM_EXPERTS
    scores_TK = 1 + h_TD[:, 3 : 3 + NUM_SLOTS] % 2
    return torch.from_numpy(np.stack([first_T, second_T], axis=1)), torch.from_numpy(scores_TK.astype(np.float32))


class DirectExperts:
    """Stands in for a dispatcher: the slow and obvious way, one copy at a time, no host."""

    overlaps = False

    def begin_step(self, step: int) -> None:
        pass

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for token, slot in np.ndindex(*experts_TK.shape):
            row_D = x_TD[token : token + 1] * scores_TK[token, slot]
            y_TD[token] += referee(layer, int(experts_TK[token, slot]), row_D)[0]
        return y_TD

    def combine(self, y_TD: Tensor) -> Tensor:
        return y_TD

    def stats(self) -> DispatchStats:
        return DispatchStats()


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a request asks for; `seed` None is greedy."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None

    def request(self, request_id: str) -> EngineRequest:
        sampling = Sampling(
            temperature=0.0 if self.seed is None else 1.5, seed=self.seed or 0, max_tokens=self.max_tokens
        )
        return EngineRequest(request_id=request_id, prompt_token_ids=self.prompt, sampling=sampling)


def engine_core(dispatcher: Any, *, num_blocks: int, clock: Any, **options: Any) -> EngineCore:
    """An engine over the model; it checks its blocks after every step."""
    return EngineCore(
        TinyModel(num_blocks),
        cast(KVCache, SimpleNamespace(layout=LAYOUT, fingerprint=b"")),
        dispatcher,
        limits=EngineLimits(model="tiny", vocab_size=VOCAB_SIZE, max_context=num_blocks * BLOCK_SIZE, max_waiting=100),
        options=EngineOptions(num_blocks=num_blocks, block_size=BLOCK_SIZE, debug_invariants=True, **options),
        eos_token_ids=(EOS,),
        clock=clock.monotonic,
    )


class _NoClock:
    def monotonic(self) -> float:
        return 0.0


@cache
def fault_free(content: Content) -> tuple[tuple[int, ...], FinishReason | None]:
    """The tokens of a request that runs alone, without hosts, in one prefill; and how it ends."""
    core = engine_core(DirectExperts(), num_blocks=64, clock=_NoClock())
    core.add(content.request("alone"))
    tokens: list[int] = []
    for output in _outputs(core):
        tokens += output.token_ids
        if output.finish_reason is not None:
            return tuple(tokens), output.finish_reason
    raise AssertionError(f"{content} never ends")


def _outputs(core: EngineCore) -> Iterator[Any]:
    while core.has_work:
        for output in core.step():
            if isinstance(output.error, Llama4Error):
                raise output.error
            yield output
