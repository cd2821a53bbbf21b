"""The obvious versions of what surrounds the model: experts computed on the spot, sequences advanced by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.batch import Batch, PageRun, SequenceSpan
from llama4_dist.model.cpu.llama4 import CpuLlama4
from llama4_dist.model.dispatcher import Dispatcher
from llama4_dist.model.expert import Experts
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import layout_of
from llama4_dist.model.llama4 import Llama4
from llama4_dist.model.load import load_model


def all_experts(checkpoint: Checkpoint, dtype: torch.dtype, weight_format: str = "stored") -> Experts:
    """Every routed expert of the checkpoint on one host."""
    config = checkpoint.config
    pairs = [(layer, expert) for layer in config.moe_layer_ids for expert in range(config.num_experts)]
    weights = {pair: checkpoint.expert(*pair) for pair in pairs}
    return Experts(weights, width=config.hidden_size, dtype=dtype, device="cpu", weight_format=weight_format)


class DirectDispatcher:
    """Sends nothing: scales the rows, sorts them by expert, computes, puts them back and adds up the K copies."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.steps: list[int] = []

    def begin_step(self, step: int) -> None:
        self.steps.append(step)

    def dispatch(
        self, layer: int, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor, microbatch: int = 0
    ) -> list[Tensor]:
        copies = []
        for experts_T, scores_T in zip(experts_TK.T, scores_TK.T, strict=True):
            order_T = experts_T.argsort(stable=True)
            x_RD = (x_TD * scores_T[:, None])[order_T]
            out_RD = torch.empty_like(x_RD)
            chosen, counts = experts_T.unique(return_counts=True)
            self.experts(layer, list(zip(chosen.tolist(), counts.tolist(), strict=True)), x_RD, out_RD)
            copies.append(torch.empty_like(out_RD).index_copy_(0, order_T, out_RD))
        return copies

    def combine(self, in_flight: list[Tensor]) -> Tensor:
        total_TD = in_flight[0]
        for copy_TD in in_flight[1:]:
            total_TD = total_TD + copy_TD
        return total_TD


@dataclass
class RunningSequence:
    pages: tuple[PageRun, ...]  # one run per group of layers; nothing is ever given back
    num_cached: int = 0


@dataclass
class Runner:
    """One model with its cache; `run` advances any number of sequences by one step and returns all their logits."""

    model: Llama4 | CpuLlama4
    dispatcher: Dispatcher
    cache: KVCache
    max_tokens: int
    sequences: list[RunningSequence] = field(default_factory=list)
    step: int = 0

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        num_sequences: int = 1,
        max_tokens: int = 128,
        block_size: int = 5,
        seed: int = 0,
        weight_format: str = "stored",
        load: Callable[..., Llama4 | CpuLlama4] = load_model,
    ) -> "Runner":
        """Give each sequence pages strewn over the cache, so that no test passes because slots lie in order."""
        load = load if weight_format == "stored" else partial(load, weight_format=weight_format)
        model = load(checkpoint, dtype=dtype, device="cpu")
        num_blocks, num_groups = -(-max_tokens // block_size), len(layout_of(checkpoint.config).groups)
        num_pages = num_blocks * num_groups * num_sequences
        cache = KVCache(checkpoint.config, num_pages=num_pages, block_size=block_size, dtype=dtype, device="cpu")
        order = iter(torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist())
        runner = cls(model, DirectDispatcher(all_experts(checkpoint, dtype, weight_format)), cache, max_tokens)
        for _ in range(num_sequences):
            runs = [PageRun(first_block=0, ids=tuple(islice(order, num_blocks))) for _ in range(num_groups)]
            runner.sequences.append(RunningSequence(tuple(runs)))
        return runner

    def run(self, parts: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Run one step of (sequence, its next tokens) and return each part's logits [tokens, V]."""
        spans: list[SequenceSpan] = []
        token_ids: list[int] = []
        for index, tokens in parts:
            sequence = self.sequences[index]
            spans.append(SequenceSpan(num_tokens=len(tokens), num_cached=sequence.num_cached, pages=sequence.pages))
            sequence.num_cached += len(tokens)
            token_ids.extend(tokens)
        self.step += 1
        batch = Batch(
            step=self.step,
            token_ids_T=torch.tensor(token_ids),
            spans=tuple(spans),
            logit_rows=tuple(range(len(token_ids))),
        )
        logits_PV = self.model.forward(batch, self.cache, self.dispatcher)
        return list(logits_PV.split([len(tokens) for _, tokens in parts]))

    def restart(self) -> None:
        """Forget all sequences; what they left in the cache stays there, as in service."""
        for sequence in self.sequences:
            sequence.num_cached = 0

    def in_chunks(self, tokens: Sequence[int], sizes: Sequence[int], index: int = 0) -> Tensor:
        """Run one sequence in steps of the given sizes, the last size again and again; return the logits [T, V]."""
        logits, start, sizes = [], 0, list(sizes)
        while start < len(tokens):
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            logits += self.run([(index, tokens[start : start + size])])
            start += size
        return torch.cat(logits)
