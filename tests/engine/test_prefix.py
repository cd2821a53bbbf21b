"""What a cached prefix is, found here block by block; and that it changes no token, whoever asks and in which order."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.page_allocator import PageAllocator
from llama4_dist.engine.prefix import PrefixChain, find_prefix
from llama4_dist.engine.scheduler import Scheduler
from llama4_dist.model.kv_layout import KVGroup, KVLayout
from llama4_dist.request import EngineRequest, TokenOutput
from tests.engine.fake_model import LAYOUT, fake_core, greedy, run, tokens
from tests.engine.sequences import request, sequence

CHUNKED = KVLayout(groups=(KVGroup(layers=(0,), chunk_size=None), KVGroup(layers=(1,), chunk_size=12)))
STRADDLING = KVLayout(groups=(KVGroup(layers=(0,), chunk_size=None), KVGroup(layers=(1,), chunk_size=10)))
LONG = tuple((7 * i) % 90 for i in range(30))


def chain(tokens: tuple[int, ...], root: bytes = b"") -> PrefixChain:
    return PrefixChain(tokens, root=root, block_size=4)


@given(st.lists(st.integers(0, 2**40), min_size=8, max_size=40), st.integers(0, 7), st.integers(1, 5))
def test_a_key_covers_every_token_before_its_end_and_the_root(text: list[int], position: int, change: int) -> None:
    keys = chain(tuple(text))
    other = [*text]
    other[position] += change
    for block in range(len(text) // 4):
        assert keys.key(block) == chain(tuple(text)[: 4 * block + 4]).key(block)
        assert keys.key(block) != chain(tuple(text), b"another tenant").key(block)
        assert (keys.key(block) == chain(tuple(other)).key(block)) == (block < position // 4)


@given(
    num_tokens=st.integers(1, 45),
    missing=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 11)), max_size=8),
    layout=st.sampled_from([LAYOUT, CHUNKED, STRADDLING]),
)
def test_the_longest_prefix_is_found_of_which_everything_needed_is_there(
    num_tokens: int, missing: set[tuple[int, int]], layout: KVLayout
) -> None:
    text = tuple(range(num_tokens))
    keys = chain(text)
    pages = {
        (group, keys.key(block)): 100 * group + block
        for group in range(len(layout.groups))
        for block in range(num_tokens // 4)
        if (group, block) not in missing
    }
    hit = find_prefix(keys, num_tokens, layout=layout, block_size=4, page_of=pages.get)

    def usable(num_blocks: int) -> bool:
        """Whether all is there that position 4 · num_blocks sees."""
        return all(
            (group, position // 4) not in missing
            for group, kind in enumerate(layout.groups)
            for position in range(kind.first_key(4 * num_blocks), 4 * num_blocks)
        )

    def reachable(num_blocks: int) -> bool:
        """Whether a search from the front gets there: full layers have no gap."""
        return all((0, block) not in missing for block in range(num_blocks))

    best = max(n for n in range((num_tokens - 1) // 4 + 1) if usable(n) and reachable(n))
    assert hit.num_blocks == best
    assert 4 * best < num_tokens, "nothing is left whose logits could be sampled"
    for group, found in enumerate(hit.pages):
        first = layout.groups[group].first_key(4 * best) // 4
        assert (found.first_block, found.ids) == (first, tuple(100 * group + block for block in range(first, best)))


def outputs_of(core: EngineCore, *requests: EngineRequest) -> dict[str, list[TokenOutput]]:
    for made in requests:
        core.add(made)
    return run(core)


@pytest.mark.parametrize("layout", [LAYOUT, CHUNKED, STRADDLING])
def test_a_second_request_computes_what_is_new_and_says_the_same(layout: KVLayout) -> None:
    core = fake_core(layout=layout, max_num_batched_tokens=64)
    first = outputs_of(core, request("a", LONG, max_tokens=9))["a"]
    batches = core.runner.model.batches  # type: ignore[attr-defined]
    num_before = len(batches)
    again = outputs_of(core, request("b", LONG, max_tokens=9))["b"]
    assert tokens(again) == tokens(first) == greedy(LONG, 9)
    # 7 of 30 / 4 blocks are full, and cached in all layers that need them.
    assert (batches[num_before].spans[0].num_cached, batches[num_before].spans[0].num_tokens) == (28, 2)
    longer = outputs_of(core, request("c", (*LONG, *tokens(first), 5), max_tokens=3))["c"]
    assert tokens(longer) == greedy((*LONG, *tokens(first), 5), 3)
    assert (core.scheduler.num_prefix_hits, core.scheduler.num_prefix_tokens) == (2, 28 + 36)


def test_a_prompt_that_is_cached_whole_computes_its_last_block_into_a_page_of_its_own() -> None:
    core = fake_core(max_num_batched_tokens=64)
    prompt = LONG[:16]
    outputs_of(core, request("a", prompt, max_tokens=9))
    assert tokens(outputs_of(core, request("b", prompt, max_tokens=9))["b"]) == greedy(prompt, 9)
    assert core.scheduler.num_prefix_tokens == 12


def test_running_sequences_share_pages_and_part_where_they_differ() -> None:
    core = fake_core(max_num_batched_tokens=64, num_blocks=14)
    core.add(request("a", LONG, max_tokens=12))
    core.step()
    core.add(request("b", LONG, max_tokens=12))
    core.add(request("c", (*LONG[:16], 1, 2), max_tokens=12))
    core.step()
    a, b, c = (list(s.pages[0].ids) for s in core.scheduler.running)
    assert a[:7] == b[:7]
    assert a[:4] == c[:4]
    assert len({*a, *b, *c}) == 10 < 8 + 8 + 5  # without sharing they would not fit at once
    outputs = run(core)
    assert tokens(outputs["b"]) == greedy(LONG, 12)[1:]
    assert tokens(outputs["c"]) == greedy((*LONG[:16], 1, 2), 12)[1:]


def test_what_another_is_computing_is_waited_for() -> None:
    """Eight sequences of one prompt compute it once; a tenant of its own does not wait, nor does a short prompt."""
    core = fake_core(max_num_batched_tokens=64, num_blocks=200)
    for index in range(8):
        core.add(request(f"n{index}", LONG, max_tokens=4, sequence_index=index))
    core.add(request("other", LONG, max_tokens=4, tenant="other"))
    core.add(request("short", LONG[:15], max_tokens=4))
    said = core.step()
    assert [s.request_id for s in core.scheduler.running] == ["n0", "other", "short"]
    said += core.step()
    assert len(core.scheduler.running) == 8  # max_num_seqs
    said += [output for outputs in run(core).values() for output in outputs]
    for index in range(8):
        assert tokens([o for o in said if o.request_id == f"n{index}"]) == greedy(LONG, 4)
    assert core.scheduler.num_prefix_tokens == 7 * 28


def test_nobody_waits_for_one_that_is_gone() -> None:
    core = fake_core(max_num_batched_tokens=8, num_blocks=200)
    core.add(request("first", LONG, max_tokens=4))
    core.add(request("second", LONG, max_tokens=4))
    core.step()
    assert [s.request_id for s in core.scheduler.running] == ["first"]
    core.abort("first")
    assert tokens(run(core)["second"]) == greedy(LONG, 4)


def test_a_host_that_lied_makes_the_engine_forget_what_it_computed() -> None:
    core = fake_core(max_num_batched_tokens=64, num_blocks=200)
    outputs_of(core, request("before", LONG, max_tokens=4))
    core.add(request("running", LONG, max_tokens=9))
    core.step()
    core.runner.dispatcher.stats().wrong_answers["expert-1"] += 1
    run(core)
    num_found = core.scheduler.num_prefix_tokens
    assert tokens(outputs_of(core, request("after", LONG, max_tokens=4))["after"]) == greedy(LONG, 4)
    assert core.scheduler.num_prefix_tokens == num_found == 28
    outputs_of(core, request("again", LONG, max_tokens=4))
    assert core.scheduler.num_prefix_tokens == 56, "what was computed since is trusted"


def test_tenants_share_nothing() -> None:
    core = fake_core(max_num_batched_tokens=64)
    outputs_of(core, request("a", LONG, max_tokens=5, tenant="x"))
    outputs_of(core, request("b", LONG, max_tokens=5, tenant="y"), request("c", LONG, max_tokens=5))
    assert core.scheduler.num_prefix_tokens == 0
    outputs_of(core, request("d", LONG, max_tokens=5, tenant="x"))
    assert core.scheduler.num_prefix_tokens == 28


def test_another_model_finds_nothing() -> None:
    names = []
    for fingerprint in (b"model a", b"model a", b"model b"):
        options = EngineOptions(block_size=4)
        scheduler = Scheduler(PageAllocator(64), LAYOUT, options, fingerprint=fingerprint)
        one = sequence("one", LONG)
        scheduler.add(one)
        assert one.chain is not None
        names.append([one.chain.key(block) for block in range(7)])
    assert names[0] == names[1]
    assert not {*names[0]} & {*names[2]}


def test_prompt_logprobs_have_every_row_computed() -> None:
    core = fake_core(max_num_batched_tokens=64)
    outputs_of(core, request("a", LONG, max_tokens=5))
    (first, *_) = outputs_of(core, request("b", LONG, max_tokens=5, prompt_logprobs=1))["b"]
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == len(LONG)
    assert core.scheduler.num_prefix_tokens == 0


def test_pages_of_ended_sequences_go_when_others_need_them_the_oldest_first() -> None:
    core = fake_core(num_blocks=16, max_num_batched_tokens=64)
    for name in "abc":
        prompt = (ord(name) % 90, *LONG[1:])
        outputs_of(core, request(name, prompt, max_tokens=2))
    # Each leaves 7 full blocks; 16 hold those of two, and two of the first one's were taken back to front.
    assert core.scheduler.allocator.num_evictions > 0
    outputs_of(core, request("c2", (ord("c") % 90, *LONG[1:]), max_tokens=2))
    assert core.scheduler.num_prefix_tokens == 28
    outputs_of(core, request("a2", (ord("a") % 90, *LONG[1:]), max_tokens=2))
    assert core.scheduler.num_prefix_tokens < 28 + 28
    assert core.scheduler.allocator.num_free == 16


REQUESTS = [
    *(request(f"n{index}", LONG, max_tokens=14, seed=3, temperature=1.0, sequence_index=index) for index in range(3)),
    request("fork", (*LONG[:13], 8, 8), max_tokens=14),
    request("replay", LONG, max_tokens=14, output_token_ids=tuple(greedy(LONG, 5))),
    request("logprobs", LONG, max_tokens=4, prompt_logprobs=0),
    request("other", LONG, max_tokens=14, tenant="other"),
]


@pytest.mark.parametrize("layout", [LAYOUT, CHUNKED, STRADDLING])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 18}, {"max_num_batched_tokens": 5, "max_num_seqs": 2}])
def test_no_token_depends_on_the_cache(options: dict[str, Any], layout: KVLayout) -> None:
    def said(core: EngineCore, *, at_once: bool) -> dict[str, list[int]]:
        said: dict[str, list[int]] = {}
        for made in [[one] for one in REQUESTS] if not at_once else [REQUESTS]:
            said |= {name: tokens(outputs) for name, outputs in outputs_of(core, *made).items()}
        return said

    off = fake_core(layout=layout, enable_prefix_caching=False, **options)
    expected = said(off, at_once=False)
    assert off.scheduler.num_prefix_tokens == off.scheduler.allocator.num_idle == 0
    for at_once in (True, False):
        core = fake_core(layout=layout, **options)
        assert said(core, at_once=at_once) == expected
        assert core.scheduler.num_prefix_hits > 0
        if at_once and "num_blocks" in options:
            assert core.scheduler.num_preemptions > 0
