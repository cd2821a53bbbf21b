"""A model whose next token a reader can compute by hand, and an engine around it.

It keeps every token in the cache slot of its block, and reads the whole sequence back through its blocks: a block with
two owners, a wrong position or a lost token changes what it says.
"""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.stats import DispatchStats
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.kv_sizing import longest_sequence
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.step import ForwardModel
from llama4_dist.model.batch import Batch, PageRun
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import KVGroup, KVLayout
from llama4_dist.request import EngineLimits, TokenOutput

VOCAB_SIZE = 97
EOS = 96
LAYOUT = KVLayout(groups=(KVGroup(layers=(0,), chunk_size=None),))


def next_token(tokens: Sequence[int]) -> int:
    """The likeliest token after `tokens`: never the end token."""
    return (31 * tokens[-1] + 7 * sum(tokens) + 5 * len(tokens)) % (VOCAB_SIZE - 1)


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """What greedy decoding must give."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeModel:
    """Logits fall by 1/8 from the likeliest token round the vocabulary.

    The first group of the layout keeps all tokens and is what is read; the others must agree on what they still have.
    """

    def __init__(self, block_size: int, layout: KVLayout = LAYOUT) -> None:
        self.block_size = block_size
        self.layout = layout
        self.slots: dict[int, int] = {}
        self.batches: list[Batch] = []
        self.before_forward: Callable[[Batch], None] = lambda batch: None

    def forward(self, batch: Batch, cache: KVCache, dispatcher: Dispatcher) -> Tensor:
        self.before_forward(batch)
        self.batches.append(batch)
        rows: list[Tensor] = []
        token_ids = batch.token_ids_T.tolist()
        for span in batch.spans:
            for position in range(span.num_cached, span.num_cached + span.num_tokens):
                token_id = token_ids.pop(0)
                for run in span.pages:
                    self.slots[self._slot(run, position)] = token_id
                tokens = [self.slots[self._slot(span.pages[0], i)] for i in range(position + 1)]
                for group, run in zip(self.layout.groups, span.pages, strict=True):
                    first = group.first_key(position)
                    seen = [self.slots[self._slot(run, i)] for i in range(first, position + 1)]
                    assert seen == tokens[first:], "a group of layers has keys of other tokens"
                rows.append((torch.arange(VOCAB_SIZE) - next_token(tokens)).remainder(VOCAB_SIZE) / -8)
        return torch.stack(rows)[list(batch.logit_rows)]

    def _slot(self, run: PageRun, position: int) -> int:
        return run.ids[position // self.block_size - run.first_block] * self.block_size + position % self.block_size


class FakeDispatcher:
    """Remembers which steps began; has no experts."""

    overlaps = False

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.counted = DispatchStats()

    def begin_step(self, step: int) -> None:
        self.begun.append(step)

    def stats(self) -> DispatchStats:
        return self.counted


def fake_core(
    *,
    num_blocks: int = 64,
    max_context: int = 128,
    clock: Callable[[], float] = time.monotonic,
    layout: KVLayout = LAYOUT,
    model: ForwardModel | None = None,
    **options: Any,
) -> EngineCore:
    """An engine core over a FakeModel, if no other is given; `core.runner.model` is the model."""
    fields = {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8, "debug_invariants": True} | options
    engine_options = EngineOptions(num_blocks=num_blocks, **fields)
    return EngineCore(
        model or FakeModel(engine_options.block_size, layout),
        cast(KVCache, SimpleNamespace(layout=layout, fingerprint=b"")),
        cast(Dispatcher, FakeDispatcher()),
        limits=EngineLimits(
            model="fake",
            vocab_size=VOCAB_SIZE,
            max_context=longest_sequence(layout, num_blocks, engine_options.block_size, at_most=max_context),
            max_waiting=engine_options.max_waiting,
        ),
        options=engine_options,
        eos_token_ids=(EOS,),
        clock=clock,
    )


def run(core: EngineCore, max_steps: int = 1000) -> dict[str, list[TokenOutput]]:
    """Step until nothing is left; outputs per request."""
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError(f"still busy after {max_steps} steps")


def tokens(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]
