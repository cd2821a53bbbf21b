"""In bfloat16 each attention and feed-forward module, given the input transformers gave its own, gives its output.

Whole models are not compared: rounding flips experts, and transformers' own eager and sdpa paths differ by several
logits. From one input there is nothing to flip but the last bits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.model.attention_plan import StepPlan, plan_step
from llama4_dist.model.batch import PageRun, SequenceSpan
from llama4_dist.model.kv_cache import KVCache
from llama4_dist.model.kv_layout import layout_of
from llama4_dist.model.llama4 import Llama4
from llama4_dist.model.moe import MixtureOfExperts
from llama4_dist.model.router import Router
from llama4_dist.stations import NotMeasured
from tests.checkpoints import make_checkpoint
from tests.model.direct import DirectDispatcher, all_experts
from tests.model.references import load_reference, reference_logits

NUM_TOKENS = 100
# Of the largest output. A bfloat16 holds 8 bits; attention sums rounded terms in another order (measured: 0.005),
# feed-forward modules agree to the last bit on the machine this was written on.
TOLERANCE = 2 * 2.0**-8


@dataclass
class Case:
    model: Llama4
    dispatcher: DirectDispatcher
    plan: StepPlan
    cache: KVCache
    seen: dict[str, tuple[Tensor, Tensor]]  # module of transformers: its input and output [T, D]


@pytest.fixture(scope="module", params=["scout", "maverick", "topk2"])
def case(in_torch: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path: Path = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, dtype=torch.bfloat16)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    reference = load_reference(path, request.param, dtype=torch.bfloat16, attention="sdpa")
    for name, module in reference.named_modules():
        if name.endswith((".self_attn", ".feed_forward")):
            module.register_forward_hook(_recorder(name.removeprefix("model.layers."), seen), with_kwargs=True)
    token_ids = torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2)).tolist()
    reference_logits(reference, token_ids)
    checkpoint = Checkpoint.open(path)
    model = Llama4.load(checkpoint, dtype=torch.bfloat16, device="cpu")
    layout = layout_of(model.config)
    num_pages = 10 * len(layout.groups)
    pages = tuple(PageRun(first_block=0, ids=tuple(range(first, first + 10))) for first in range(0, num_pages, 10))
    plan = plan_step(
        [SequenceSpan(num_tokens=NUM_TOKENS, num_cached=0, pages=pages)],
        floor_scale=model.config.floor_scale,
        attn_scale=model.config.attn_scale,
        frequencies_C=model.frequencies_C,
        layout=layout,
        block_size=10,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    cache = KVCache(model.config, num_pages=num_pages, block_size=10, dtype=torch.bfloat16, device="cpu")
    return Case(model, DirectDispatcher(all_experts(checkpoint, torch.bfloat16)), plan, cache, seen)


def _recorder(name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        result = output[0] if isinstance(output, tuple) else output
        seen[name] = given.reshape(NUM_TOKENS, -1).clone(), result.reshape(NUM_TOKENS, -1).clone()

    return record


def test_attention_of_every_layer_gives_the_reference_output(case: Case) -> None:
    for index, layer in enumerate(case.model.layers):
        x_TD, expected_TD = case.seen[f"{index}.self_attn"]
        with torch.inference_mode():
            output_TD = layer.attention(_padded(x_TD, case.plan), case.plan, case.cache)[:NUM_TOKENS]
        assert_near(output_TD, expected_TD)


def test_feed_forward_of_every_layer_gives_the_reference_output(case: Case) -> None:
    for index, layer in enumerate(case.model.layers):
        x_TD, expected_TD = case.seen[f"{index}.feed_forward"]
        with torch.inference_mode():
            if isinstance(layer.feed_forward, MixtureOfExperts):
                in_flight = layer.feed_forward.dispatch(x_TD, NUM_TOKENS, case.dispatcher, microbatch=0)
                output_TD = layer.feed_forward.combine(x_TD, NUM_TOKENS, in_flight, case.dispatcher, NotMeasured())
                decided_T = ~_tied(x_TD, layer.feed_forward.router)
                assert decided_T.sum() >= 0.9 * NUM_TOKENS
                output_TD, expected_TD = output_TD[decided_T], expected_TD[decided_T]
            else:
                output_TD = layer.feed_forward(x_TD)
        assert_near(output_TD, expected_TD)


def _tied(x_TD: Tensor, router: Router) -> Tensor:
    """Tokens whose K-th and next logits are equal: torch.topk may take either, we take the lower index."""
    top_TK = (x_TD @ router.weight_ED.T).topk(router.experts_per_token + 1).values
    return top_TK[:, -1] == top_TK[:, -2]


def _padded(x_TD: Tensor, plan: StepPlan) -> Tensor:
    return torch.nn.functional.pad(x_TD, (0, 0, 0, len(plan.rotation_T1C) - len(x_TD)))


def assert_near(output_TD: Tensor, expected_TD: Tensor) -> None:
    largest = float(expected_TD.abs().max())
    deviation = float((output_TD.float() - expected_TD.float()).abs().max())
    assert deviation <= TOLERANCE * largest, f"{deviation=} of {largest=}"
