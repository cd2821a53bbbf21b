"""The Python API over real tiny checkpoints, in one process and over expert hosts."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4_dist import LLM, Message, Sampling
from llama4_dist.engine.port import EngineStats
from llama4_dist.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from llama4_dist.request import FinishReason
from tests.checkpoints import make_checkpoint
from tests.model.references import load_reference, reference_logits
from tests.presets import BOS
from tests.tokenizers_tiny import make_tokenizer
from tests.waiting import wait_until

GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"), "scout")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> Iterator[LLM]:
    with LLM(model_dir, num_threads=1, kv_cache_bytes=1 << 22) as opened:
        yield opened


def test_prompts_are_answered_in_order_and_alone_as_together(llm: LLM) -> None:
    prompts = ["the first", "a second prompt", "third"]
    together = llm.generate(prompts, GREEDY)
    assert [completion.prompt_token_ids[1:] for completion in together] == [
        tuple(llm.tokenizer.encode(prompt)) for prompt in prompts  # type: ignore[union-attr]
    ]  # fmt: skip
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert all(len(c.token_ids) == 12 and c.finish_reason is FinishReason.LENGTH for c in together)
    assert together[0].text == llm.tokenizer.decode(together[0].token_ids)  # type: ignore[union-attr]
    assert (together[0].usage.prompt_tokens, together[0].usage.completion_tokens) == (10, 12)


def test_text_gets_bos_and_ids_are_taken_as_they_are(llm: LLM) -> None:
    (text,) = llm.generate("ab", GREEDY)
    (bare,) = llm.generate("ab", GREEDY, add_bos=False)
    (ids,) = llm.generate([[BOS, *bare.prompt_token_ids]], GREEDY)
    (flat,) = llm.generate([BOS, *bare.prompt_token_ids], GREEDY)
    assert text.prompt_token_ids == (BOS, *bare.prompt_token_ids) == ids.prompt_token_ids == flat.prompt_token_ids
    assert text.token_ids == ids.token_ids == flat.token_ids


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    short, long = (Sampling(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (2, 5))
    assert [len(c.token_ids) for c in llm.generate(["a", "a"], [short, long])] == [2, 5]
    with pytest.raises(InvalidRequestError, match="2 entries for 3 prompts"):
        llm.generate(["a", "b", "c"], [short, long])


def test_n_sequences_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    sampling = Sampling(n=3, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
    (first,), (again,) = llm.generate("x", sampling), llm.generate("x", sampling)
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]
    assert len({o.token_ids for o in first.outputs}) == 3
    for output in first.outputs:
        assert output.logprobs is not None
        assert [entry.token.token_id for entry in output.logprobs] == list(output.token_ids)
        assert {len(entry.top) for entry in output.logprobs} == {2}


def test_a_stop_string_cuts_the_text_and_frees_the_engine(llm: LLM) -> None:
    (whole,) = llm.generate("tell", Sampling(temperature=0.0, max_tokens=200, ignore_eos=True))
    stop = next(char for char in whole.text[3:] if char.isalnum())
    before = llm.stats().requests_cancelled
    (cut,) = llm.generate("tell", Sampling(temperature=0.0, max_tokens=200, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.outputs[0].stop_reason) == (FinishReason.STOP, stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    stats = when_idle(llm)
    assert stats.requests_cancelled == before + 1
    assert stats.kv_blocks_free == stats.kv_blocks_total


def when_idle(llm: LLM) -> EngineStats:
    """Stats once nothing runs; an abort takes effect before the engine's next step."""
    wait_until(lambda: not llm.stats().requests_running, "no request runs")
    return llm.stats()


def test_an_interrupt_frees_the_engine(llm: LLM) -> None:
    before = llm.stats().requests_cancelled

    def interrupt() -> None:
        while not llm.stats().requests_running:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as Ctrl-C does

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], Sampling(temperature=0.0, max_tokens=1000, ignore_eos=True))
    thread.join(60)
    stats = when_idle(llm)
    assert stats.requests_cancelled == before + 2
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert len(llm.generate("a", GREEDY)[0].token_ids) == 12


def test_chat_writes_the_format_and_takes_dicts_and_several_conversations(llm: LLM) -> None:
    as_objects = llm.chat([Message(role="user", content="hi")], GREEDY)
    as_dicts = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    several = llm.chat([[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]], GREEDY)
    assert as_objects[0].token_ids == as_dicts[0].token_ids == several[0].token_ids
    assert len(several) == 2
    shown = llm.tokenizer.decode(as_dicts[0].prompt_token_ids, skip_special_tokens=False)  # type: ignore[union-attr]
    assert shown == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([[]], "messages"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user", "content": "x", "tool_calls": []}], r"messages\[0\]"),
        ([{"role": "user"}], r"messages\[0\]"),
        ("hello", r"messages\[0\]"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]\.content"),
    ],
)
def test_a_wrong_conversation_is_refused_by_field(llm: LLM, messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_scores_are_transformers_logits(llm: LLM, model_dir: Path, chunk_size: int | None) -> None:
    token_ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected_TV = reference_logits(load_reference(model_dir, "scout"), token_ids)
    logits_TV = llm.score(token_ids, chunk_size=chunk_size)
    assert (logits_TV.dtype, tuple(logits_TV.shape)) == (torch.float32, (40, 320))
    torch.testing.assert_close(logits_TV, expected_TV, atol=2e-4, rtol=0.0)


def test_without_sampling_the_checkpoints_defaults_apply(llm: LLM) -> None:
    assert (llm.default_sampling.temperature, llm.default_sampling.top_p) == (0.6, 0.9)


@pytest.mark.parametrize(
    ("prompts", "sampling", "named"),
    [
        ("", GREEDY, "prompt: is empty"),
        ([[]], GREEDY, "prompt: is empty"),
        ([[320]], GREEDY, r"prompt\[0\]"),
        (["ok", [1, -1]], GREEDY, r"prompts\[1\]\.prompt\[1\]"),
        (["ok", "\ud800"], GREEDY, r"prompts\[1\]\.prompt: holds a lone surrogate"),
        ("ok", Sampling(temperature=-1.0, n=0), "n: .*temperature: "),
        (["ok", 3.5], GREEDY, r"prompts\[1\]: must be text or token ids"),
        (3, GREEDY, "prompts: must be text"),
        ([[1] * 1024], GREEDY, "exceed the context of 1024"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(
    llm: LLM, prompts: Any, sampling: Sampling, named: str
) -> None:
    before = llm.stats().requests_admitted
    with pytest.raises(InvalidRequestError, match=named):
        llm.generate(prompts, sampling)
    assert llm.stats().requests_admitted == before


def test_no_prompts_give_no_answers(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_threads_may_call_at_once(llm: LLM) -> None:
    expected = {prompt: llm.generate(prompt, GREEDY)[0].token_ids for prompt in ("one", "two", "three")}
    found: dict[str, tuple[int, ...]] = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: found.update({prompt: llm.generate(prompt, GREEDY)[0].token_ids}))
        for prompt in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_a_checkpoint_without_a_tokenizer_takes_ids_and_gives_ids(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "dense")
    loaded: list[tuple[int, int]] = []
    with LLM(tmp_path, num_threads=1, kv_cache_bytes=1 << 22, progress=lambda *at: loaded.append(at)) as bare:
        assert loaded[-1][0] == loaded[-1][1] > 0
        (answer,) = bare.generate([[5, 6, 7]], GREEDY)
        assert (answer.text, len(answer.token_ids)) == ("", 12)
        with pytest.raises(UnsupportedError, match="give token ids"):
            bare.generate("text", GREEDY)
        with pytest.raises(UnsupportedError, match="tokenizer"):
            bare.chat([Message(role="user", content="hi")], GREEDY)


def test_a_closed_llm_answers_no_more(model_dir: Path) -> None:
    opened = LLM(model_dir, num_threads=1, kv_cache_bytes=1 << 22)
    opened.close()
    opened.close()
    with pytest.raises(UnavailableError):
        opened.generate("x", GREEDY)


def test_contradicting_or_missing_settings_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_expert_hosts=-1"):
        LLM(model_dir, num_expert_hosts=-1)
    with pytest.raises(ConfigError, match="num_attention_workers"):
        LLM(model_dir, num_attention_workers=2)
    with pytest.raises(ConfigError, match="dtype"):
        LLM(model_dir, dtype="int3")
    with pytest.raises(CheckpointError):
        LLM(tmp_path / "nowhere")


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "dense")
    make_tokenizer(tmp_path, vocab_size=321)
    with pytest.raises(CheckpointError, match="another checkpoint"):
        LLM(tmp_path, num_threads=1)


def run_python(code: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    heavy = {"torch", "ray", "numpy", "grpc"}
    assert run_python(f"import sys, llama4_dist; llama4_dist.Sampling; print({heavy} & set(sys.modules))") == "set()"


def test_one_process_imports_no_ray(model_dir: Path) -> None:
    code = (
        "import sys; from llama4_dist import LLM, Sampling\n"
        f"with LLM({str(model_dir)!r}, num_threads=1, kv_cache_bytes=1 << 22) as llm:\n"
        "    answer, = llm.generate('x', Sampling(max_tokens=2, temperature=0, ignore_eos=True))\n"
        "print(len(answer.token_ids), 'ray' in sys.modules, 'grpc' in sys.modules)\n"
    )
    assert run_python(code) == "2 False False"


@pytest.mark.ray
def test_expert_hosts_answer_as_one_process_does(llm: LLM, model_dir: Path) -> None:
    prompts = ["the first", "a second prompt"]
    expected = [completion.token_ids for completion in llm.generate(prompts, GREEDY)]
    loaded: list[tuple[int, int]] = []
    options: dict[str, Any] = {"num_threads": 1, "kv_cache_bytes": 1 << 22}
    with LLM(model_dir, num_expert_hosts=2, progress=lambda *at: loaded.append(at), **options) as cluster:
        assert loaded[-1][0] == loaded[-1][1] > 0
        assert [completion.token_ids for completion in cluster.generate(prompts, GREEDY)] == expected
        assert len(cluster.stats().host_rows) == 2


def test_a_model_that_is_cut_answers_as_one_that_is_not(llm: LLM, model_dir: Path) -> None:
    prompts = ["the first", "a second prompt"]
    expected = [completion.token_ids for completion in llm.generate(prompts, GREEDY)]
    with LLM(model_dir, num_stages=2, num_ranks=2, num_threads=1, kv_cache_bytes=1 << 22) as cut:
        assert [completion.token_ids for completion in cut.generate(prompts, GREEDY)] == expected
    with pytest.raises(ConfigError, match="num_stages=0 must be at least 1"):
        LLM(model_dir, num_stages=0)
