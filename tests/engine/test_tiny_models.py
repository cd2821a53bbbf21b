"""The whole engine on tiny checkpoints of the family, against transformers and against itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.local import LocalEngine
from llama4_dist.engine.options import EngineOptions
from llama4_dist.request import EngineRequest, TokenOutput
from tests.checkpoints import make_checkpoint
from tests.engine.collector import Collector
from tests.engine.fake_model import tokens
from tests.engine.sequences import request
from tests.model.references import load_reference, reference_logits

MARGIN = 5e-4  # below this gap between the two best logits a tie may go either way
PROMPTS = {f"p{length}": tuple((7 * i + length) % 256 for i in range(length)) for length in (1, 5, 15, 16, 17, 40, 100)}
DRAWN = {"temperature": 1.0, "top_p": 0.95, "ignore_eos": True, "max_tokens": 20}

Run = Callable[..., dict[str, list[TokenOutput]]]


@pytest.fixture(scope="module", params=["scout", "maverick"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def run(checkpoint: Path) -> Iterator[Run]:
    """Run requests on a fresh engine and return their outputs; `run.engine` is the last engine."""
    engines: list[LocalEngine] = []

    def start_and_wait(
        requests: list[EngineRequest], *, num_inproc_hosts: int = 1, expert_slices: int = 1, **options: Any
    ) -> dict[str, list[TokenOutput]]:
        fields = {"num_blocks": 200, "debug_invariants": True} | options
        engine = build_single_process(
            checkpoint,
            num_inproc_hosts=num_inproc_hosts,
            expert_slices=expert_slices,
            options=EngineOptions(**fields),
            num_threads=1,
        )
        engines.append(engine)
        collector = Collector()
        engine.start(collector)
        for made in requests:
            engine.submit(made)
        collector.wait_for(*(made.request_id for made in requests))
        stats = engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks_total
        start_and_wait.prefix_tokens = stats.prefix_tokens  # type: ignore[attr-defined]
        start_and_wait.preemptions = stats.preemptions  # type: ignore[attr-defined]
        return collector.outputs

    yield start_and_wait
    for engine in engines:
        engine.close()


def ids(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    return {name: tokens(outputs[name]) for name in sorted(outputs)}


def greedy_requests(**fields: Any) -> list[EngineRequest]:
    return [
        request(name, prompt, **({"max_tokens": 12, "ignore_eos": True} | fields)) for name, prompt in PROMPTS.items()
    ]


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> dict[str, list[int]]:
    """Greedy tokens of transformers' generate, up to the first near tie."""
    model = load_reference(checkpoint, "text")
    expected = {}
    for name, prompt in PROMPTS.items():
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=12,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best_T2 = torch.cat(generated.logits).topk(2).values
        margins = (best_T2[:, 0] - best_T2[:, 1]).tolist()
        sure = next((i for i, margin in enumerate(margins) if margin < MARGIN), len(margins))
        expected[name] = generated.sequences[0, len(prompt) :].tolist()[:sure]
    assert sum(map(len, expected.values())) > 60, "too many near ties to say anything"
    return expected


def test_greedy_tokens_are_those_of_transformers_however_they_are_batched(
    run: Run, reference: dict[str, list[int]]
) -> None:
    alone = run(greedy_requests(), max_num_seqs=1)
    batched = run(greedy_requests())
    chunked = run(greedy_requests(), max_num_batched_tokens=11, max_num_seqs=5)
    assert ids(alone) == ids(batched) == ids(chunked)
    for name, expected in reference.items():
        assert tokens(alone[name])[: len(expected)] == expected


@pytest.mark.parametrize("expert_slices", [2, 4])  # of 48 and 48 columns; of 32, 32, 16 and 16
def test_experts_cut_into_slices_say_the_tokens_of_transformers_on_any_hosts(
    run: Run, reference: dict[str, list[int]], expert_slices: int
) -> None:
    one = run(greedy_requests(), expert_slices=expert_slices)
    for name, expected in reference.items():
        assert tokens(one[name])[: len(expected)] == expected
    for num_hosts in (2, 3):
        assert ids(run(greedy_requests(), expert_slices=expert_slices, num_inproc_hosts=num_hosts)) == ids(one)


def test_a_prompt_over_chunk_edges_gives_the_same_tokens_at_once_and_token_by_token(run: Run) -> None:
    """At once needs the pages of seven chunks in one step, token by token never more than one; scarce: cut at edges."""
    requests = [request("a", PROMPTS["p100"], max_tokens=40, ignore_eos=True)]
    at_once = run(requests)
    assert ids(run(requests, max_num_batched_tokens=1, max_num_seqs=1)) == ids(at_once)
    assert ids(run(requests, max_num_batched_tokens=23, max_num_seqs=1)) == ids(at_once)
    assert ids(run(requests, num_blocks=12, block_size=16)) == ids(at_once)
    assert ids(run(requests, num_blocks=43, block_size=5)) == ids(at_once)


def test_preemption_changes_no_token(run: Run) -> None:
    roomy = run(greedy_requests(max_tokens=40))
    assert run.preemptions == 0  # type: ignore[attr-defined]
    tight = run(greedy_requests(max_tokens=40), num_blocks=13, max_num_batched_tokens=64, max_num_seqs=7)
    assert run.preemptions > 0  # type: ignore[attr-defined]
    assert ids(tight) == ids(roomy)


def test_a_cached_prefix_changes_no_token(run: Run) -> None:
    """A conversation goes on: each turn begins with all that was said, and stands in the cache beside the others'."""
    requests = [
        request(f"{name}/{index}", prompt, seed=5, sequence_index=index, **DRAWN)
        for name, prompt in PROMPTS.items()
        for index in range(2)
    ]
    expected = ids(run(requests, enable_prefix_caching=False))
    together = run(requests)
    assert ids(together) == expected
    turns = [request("p40/0", PROMPTS["p40"], seed=5, **DRAWN)]
    said = PROMPTS["p40"] + tuple(expected["p40/0"])
    turns += [
        request(f"turn{length}", said[:length], seed=9, temperature=1.0, max_tokens=10, ignore_eos=True)
        for length in (33, 48, 49, 60)
    ]
    apart = {made.request_id: tokens(run([made], enable_prefix_caching=False)[made.request_id]) for made in turns}
    for options in ({}, {"num_blocks": 13, "max_num_batched_tokens": 11, "max_num_seqs": 5}):
        outputs = run(turns, max_num_seqs=1) if not options else run(turns, **options)
        assert ids(outputs) == dict(sorted(apart.items()))
        assert run.prefix_tokens > 0  # type: ignore[attr-defined]


def test_seeded_draws_are_the_same_alone_and_in_a_batch(run: Run) -> None:
    requests = [request(name, prompt, seed=len(prompt), **DRAWN) for name, prompt in PROMPTS.items()]
    batched = run(requests)
    assert ids(run(requests, max_num_seqs=1)) == ids(batched)
    assert ids(run(requests, max_num_batched_tokens=16, max_num_seqs=3)) == ids(batched)


@pytest.mark.parametrize("num_inproc_hosts", [2, 4, 7, 16])
def test_any_number_of_expert_hosts_gives_the_same_tokens(run: Run, num_inproc_hosts: int) -> None:
    names = ("p17", "p40")
    requests = [request(f"greedy-{name}", PROMPTS[name], max_tokens=8) for name in names]
    requests += [request(f"drawn-{name}", PROMPTS[name], seed=3, **DRAWN) for name in names]
    assert ids(run(requests, num_inproc_hosts=num_inproc_hosts)) == ids(run(requests))


def test_a_replay_draws_the_remaining_tokens(run: Run) -> None:
    fields = DRAWN | {"seed": 5, "presence_penalty": 0.7, "repetition_penalty": 1.2}
    whole = tokens(run([request("whole", PROMPTS["p40"], **fields)])["whole"])
    rest = run([request("rest", PROMPTS["p40"], output_token_ids=tuple(whole[:7]), **fields)])["rest"]
    assert tokens(rest) == whole[7:]
    assert len(whole) == 20


def test_prompt_logprobs_are_transformers_log_softmax(run: Run, checkpoint: Path) -> None:
    prompt = PROMPTS["p100"]
    model = load_reference(checkpoint, "text")
    logprobs_TV = reference_logits(model, list(prompt)).log_softmax(-1)
    (first, *_) = run([request("a", prompt, max_tokens=2, prompt_logprobs=3, logprobs=3)], max_logit_rows=33)["a"]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
        assert entry is not None
        row_V = logprobs_TV[position - 1]
        assert entry.token.token_id == prompt[position]
        assert entry.token.logprob == pytest.approx(row_V[prompt[position]].item(), abs=2e-4)
        top = row_V.topk(3)
        assert [e.logprob for e in entry.top] == pytest.approx(top.values.tolist(), abs=2e-4)
    assert first.logprobs is not None
    assert first.logprobs[0].token.logprob == pytest.approx(logprobs_TV[-1].max().item(), abs=2e-4)


@pytest.mark.parametrize("chunk_size", [None, 1, 13])
def test_scores_are_transformers_logits(checkpoint: Path, chunk_size: int | None) -> None:
    model = load_reference(checkpoint, "text")
    text = PROMPTS["p100"]
    expected_TV = reference_logits(model, list(text))
    engine = build_single_process(checkpoint, options=EngineOptions(num_blocks=40))
    engine.start(Collector())
    logits_TV = engine.score(text, chunk_size=chunk_size)
    engine.close()
    torch.testing.assert_close(logits_TV, expected_TV, atol=2e-4, rtol=0.0)


def test_the_published_end_tokens_stop(checkpoint: Path) -> None:
    engine = build_single_process(checkpoint, options=EngineOptions(num_blocks=40))
    collector = Collector()
    engine.start(collector)
    for end in (257, 263, 264):
        engine.submit(request(f"r{end}", (1, 2, 3), logit_bias={end: 100.0}, max_tokens=5))
    for end in (257, 263, 264):
        assert collector.wait_for(f"r{end}")[-1].stop_token_id == end
    engine.close()
