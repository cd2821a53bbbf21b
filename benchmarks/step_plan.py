"""How long it takes to plan a decode step of Scout's 48 layers in 4 groups: schedule, batch, attention plan; no model.

python -m benchmarks.step_plan [--context 1024]
"""

import argparse
import time
from collections import Counter
from statistics import median

import torch

from llama4_dist.engine.batch_builder import build_batch
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.page_allocator import PageAllocator
from llama4_dist.engine.plan import StepPlan
from llama4_dist.engine.scheduler import Scheduler
from llama4_dist.engine.sequence import SequenceState
from llama4_dist.model.attention_plan import plan_step
from llama4_dist.model.kv_layout import KVGroup, KVLayout
from llama4_dist.model.rope import frequencies
from llama4_dist.request import EngineRequest, Sampling

LAYERS = tuple(range(48))
FULL = LAYERS[3::4]
CHUNKED = tuple(layer for layer in LAYERS if layer % 4 != 3)
LAYOUT = KVLayout(
    groups=(
        KVGroup(layers=FULL, chunk_size=None),
        *(KVGroup(layers=CHUNKED[start : start + 12], chunk_size=8192) for start in (0, 12, 24)),
    )
)
STATIONS = ("schedule", "batch", "plan", "tables", "gathers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"ms a step, median of {arguments.steps}, {arguments.context} tokens of context")
    print("sequences " + " ".join(f"{name:>9}" for name in STATIONS) + "   batch+plan+tables")
    for num_sequences in (1, 32, 256):
        seconds = measure(num_sequences, arguments.context, arguments.steps)
        host = sum(seconds[name] for name in ("batch", "plan", "tables"))
        print(
            f"{num_sequences:>9} "
            + " ".join(f"{1e3 * seconds[name]:9.3f}" for name in STATIONS)
            + f"   {1e3 * host:.3f}"
        )


def measure(num_sequences: int, context: int, num_steps: int) -> dict[str, float]:
    """Return the median seconds of each station over decode steps."""
    options = EngineOptions(max_num_seqs=num_sequences, max_num_batched_tokens=max(2048, num_sequences))
    num_pages = num_sequences * LAYOUT.max_pages(context + num_steps + 32, options.block_size)
    scheduler = Scheduler(PageAllocator(num_pages), LAYOUT, options)
    for number in range(num_sequences):
        scheduler.add(_sequence(number, context))
    while any(sequence.num_pending != 1 or not sequence.num_cached for sequence in scheduler.live()):
        _compute(scheduler, scheduler.schedule())
    taken: dict[str, list[float]] = {name: [] for name in STATIONS}
    frequencies_C = frequencies(128, 500000.0, None)
    for step in range(num_steps):
        times = [time.perf_counter()]
        planned = scheduler.schedule()
        times.append(time.perf_counter())
        batch = build_batch(planned.spans, step=step, device="cpu").batch
        times.append(time.perf_counter())
        plan = plan_step(
            batch.spans,
            floor_scale=8192.0,
            attn_scale=0.1,
            frequencies_C=frequencies_C,
            layout=LAYOUT,
            block_size=options.block_size,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        times.append(time.perf_counter())
        for group in plan.groups:  # what kernels read that walk pages
            _ = (group.slots_T, group.pages_BN, group.first_block_B)
            _ = (group.axes.sequence_T, group.axes.first_key_T, group.axes.num_keys_T)
        times.append(time.perf_counter())
        for group in plan.groups:  # what attention reads that gathers keys
            _ = (group.prefill, group.decode)
        times.append(time.perf_counter())
        for name, start, stop in zip(STATIONS, times[:-1], times[1:], strict=True):
            taken[name].append(stop - start)
        _compute(scheduler, planned)
    return {name: median(values) for name, values in taken.items()}


def _sequence(number: int, context: int) -> SequenceState:
    tokens = [(number * 7919 + position) % 200_000 for position in range(context)]
    request = EngineRequest(request_id=str(number), prompt_token_ids=tuple(tokens), sampling=Sampling())
    return SequenceState(
        request=request,
        seed=0,
        max_tokens=1 << 20,
        end_token_ids=frozenset(),
        order=(0, number),
        arrived_s=0.0,
        deadline_s=None,
        tokens=tokens,
        output_counts=Counter(),
    )


def _compute(scheduler: Scheduler, plan: StepPlan) -> None:
    for span in plan.spans:
        span.sequence.num_cached += span.num_tokens
    scheduler.keep_prefixes(plan.spans)
    for span in plan.spans:
        if span.sequence.num_pending == 0:
            span.sequence.append(len(span.sequence.tokens) % 200_000)


if __name__ == "__main__":
    main()
