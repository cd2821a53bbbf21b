"""`LLM`: opens a checkpoint and answers prompts; the engine and its processes stay inside.

with LLM("path/to/checkpoint") as llm:
    print(llm.generate("The sea", Sampling(max_tokens=32))[0].text)
"""

import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from llama4_dist.checkpoint.generation_file import GenerationDefaults
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.config import ModelConfig
from llama4_dist.engine.options import EngineOptions
from llama4_dist.engine.port import EngineStats
from llama4_dist.errors import ConfigError, FieldViolation, InvalidRequestError, UnsupportedError
from llama4_dist.llm.inputs import Messages, conversation_list, prompt_list, sampling_list
from llama4_dist.llm.open_engine import Progress, open_engine, shown
from llama4_dist.llm.runner import Runner
from llama4_dist.partition import Partition
from llama4_dist.request import Completion, EngineLimits, Prompt, Sampling
from llama4_dist.text.chat import encode_chat
from llama4_dist.text.request_state import RequestState
from llama4_dist.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from llama4_dist.validation import check_messages, check_text, check_token_ids

if TYPE_CHECKING:
    from torch import Tensor


class LLM:
    """A model that answers, in this process or spread over a Ray cluster; close it, or use `with`.

    `num_expert_hosts` 0 runs all in this process and never imports Ray; N puts the experts on N hosts and attention on
    `num_attention_workers` more, on the cluster at `ray_address` or on one started here. Every expert is cut into
    `expert_slices`, so that hosts may hold parts of it; it is part of the arithmetic. `expert_memory_bytes` is how much
    of the experts each host keeps in memory: the others are read when they are asked for. The layers of an attention
    worker are cut into `num_stages`, and each into `num_ranks`: members hold one part each, in processes of their own
    where there are expert hosts. The number of ranks is part of the arithmetic. `dtype` "auto" is the
    checkpoint's own. `weights` "int8" takes half the memory of bfloat16 and changes tokens; it needs a processor with a
    compiler. `max_context` and `kv_cache_bytes` default to what model and memory allow; `num_threads` are CPU
    threads of the attention side. `progress` True shows a bar while weights load; a function gets (done, total).

    A checkpoint without tokenizer files takes token ids and returns ids with empty text. Several threads may call at
    once. Raises CheckpointError and ConfigError.
    """

    def __init__(  # noqa: PLR0913 - the settings of an engine, all by name
        self,
        model_dir: Path | str,
        *,
        dtype: str = "auto",
        weights: str = "stored",
        device: str = "cpu",
        num_expert_hosts: int = 0,
        expert_slices: int = 1,
        expert_memory_bytes: int | None = None,
        num_attention_workers: int = 1,
        num_stages: int = 1,
        num_ranks: int = 1,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_context: int | None = None,
        kv_cache_bytes: int | None = None,
        num_threads: int | None = None,
        ray_address: str | None = None,
        progress: bool | Progress = False,
    ) -> None:
        model_dir = Path(model_dir)
        if num_expert_hosts < 0:
            raise ConfigError(f"num_expert_hosts={num_expert_hosts} must be 0 (this process only) or more")
        if num_expert_hosts == 0 and (num_attention_workers != 1 or ray_address is not None):
            raise ConfigError("num_attention_workers and ray_address need num_expert_hosts of at least 1")
        try:
            partition = Partition(num_stages=num_stages, num_ranks=num_ranks)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        checkpoint = Checkpoint.open(model_dir)  # headers only; each worker maps the weights it needs
        checkpoint.close()
        self.config: ModelConfig = checkpoint.config
        self.default_sampling = sampling_defaults(checkpoint.generation)
        self.tokenizer: Tokenizer | None = load_tokenizer(model_dir)
        if self.tokenizer is not None:
            check_vocabulary(self.tokenizer, self.config.vocab_size)
        options = EngineOptions(
            # A running sequence takes a token of every step, so more of them than tokens could never run.
            max_num_seqs=min(max_num_seqs, max_num_batched_tokens),
            max_num_batched_tokens=max_num_batched_tokens,
            max_context=max_context,
            kv_cache_bytes=kv_cache_bytes,
            model_name=model_dir.resolve().name,
        )
        with shown(progress) as report:
            self._engine = open_engine(
                model_dir,
                num_expert_hosts=num_expert_hosts,
                num_attention_workers=num_attention_workers,
                options=options,
                ray_address=ray_address,
                progress=report,
                dtype=dtype,
                weights=weights,
                expert_slices=expert_slices,
                partition=partition,
                expert_memory_bytes=expert_memory_bytes,
                device=device,
                num_threads=num_threads,
            )
        self._runner = Runner(self._engine)

    @property
    def limits(self) -> EngineLimits:
        """What a request may ask for; `limits.max_context` is the room for prompt and answer together."""
        return self._engine.limits

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        add_bos: bool = True,
    ) -> list[Completion]:
        """Answer prompts (text or token ids) in their order; one `Sampling` for all, or one each.

        Text gets the BOS token in front unless `add_bos` is False; token ids are taken as they are. Without `sampling`
        the checkpoint's `default_sampling` applies. Raises InvalidRequestError before anything runs; an interrupt
        aborts what runs.
        """
        given = prompt_list(prompts)
        token_ids = [self._token_ids(_place(index, given), prompt, add_bos) for index, prompt in enumerate(given)]
        return self._run(token_ids, sampling)

    def chat(
        self, messages: Messages | Sequence[Messages], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Answer one conversation, or several; messages are `Message` objects or dicts of role and content."""
        tokenizer, limits = self._needed_tokenizer("chat"), self.limits
        conversations = conversation_list(messages)
        for conversation in conversations:
            check_messages(conversation, limits)
        return self._run([encode_chat(tokenizer, conversation) for conversation in conversations], sampling)

    def score(self, token_ids: Sequence[int], chunk_size: int | None = None) -> "Tensor":
        """Return the float32 logits_TV that follow each token; row t predicts token t + 1.

        `chunk_size` bounds the tokens of a forward pass; 1 computes each as decoding does.
        """
        check_token_ids("token_ids", token_ids, self.limits.vocab_size)
        return self._engine.score(token_ids, chunk_size=chunk_size)

    def stats(self) -> EngineStats:
        """Return the engine's counters of now."""
        return self._engine.stats()

    def close(self) -> None:
        """Stop the engine and every process it started; safe to call twice."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, prompts: list[list[int]], sampling: Sampling | Sequence[Sampling] | None) -> list[Completion]:
        each = sampling_list(sampling, self.default_sampling, len(prompts))
        states = [
            self._state(_place(index, prompts), token_ids, wanted)
            for index, (token_ids, wanted) in enumerate(zip(prompts, each, strict=True))
        ]
        self._runner.run(states)
        return [state.completion() for state in states]

    def _state(self, place: str, token_ids: list[int], sampling: Sampling) -> RequestState:
        try:
            return RequestState(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=token_ids,
                sampling=sampling,
                limits=self.limits,
                tokenizer=self.tokenizer,
            )
        except InvalidRequestError as error:
            named = [FieldViolation(field=place + v.field, description=v.description) for v in error.violations]
            raise InvalidRequestError(named, reason=error.reason) from None

    def _token_ids(self, place: str, prompt: Prompt, add_bos: bool) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self._needed_tokenizer("a text prompt")
        check_text(f"{place}prompt", prompt, self.limits)
        return [tokenizer.bos_token_id] * add_bos + tokenizer.encode(prompt)

    def _needed_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UnsupportedError(
                f"{what} needs a tokenizer, and the checkpoint has no tokenizer.json or tokenizer.model; give token ids"
            )
        return self.tokenizer


def _place(index: int, prompts: Sequence[object]) -> str:
    """Return what precedes the name of a refused field: nothing where there is one prompt."""
    return f"prompts[{index}]." if len(prompts) > 1 else ""


def sampling_defaults(generation: GenerationDefaults) -> Sampling:
    """Return the way to sample that the checkpoint's author published, else plain sampling."""
    if generation.do_sample is False:
        return Sampling(temperature=0.0)
    return Sampling(
        temperature=1.0 if generation.temperature is None else generation.temperature,
        top_p=1.0 if generation.top_p is None else generation.top_p,
    )
