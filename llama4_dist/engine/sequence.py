"""The state of one sequence between its submission and its last token; plain data for the scheduler and the sampler."""

from collections import Counter
from dataclasses import dataclass, field

from llama4_dist.engine.page_move import Pages, num_covered
from llama4_dist.engine.prefix import PrefixChain
from llama4_dist.request import EngineRequest, PositionLogprobs, Sampling


@dataclass(eq=False, slots=True, kw_only=True)
class SequenceState:
    """A sequence: its tokens, how many of them are in the KV cache, and the pages that hold them.

    `tokens` is prompt + output. `num_cached` positions are in the cache; the rest is pending. A preempted sequence
    falls back to `num_cached = 0` and keeps its tokens, so it recomputes and continues. `order` is the place in the
    queue: (priority, arrival); lower runs earlier, as in vLLM. `chain` names blocks where prefixes are cached, and
    `num_named` of them have been named. Times are seconds of the engine's clock.
    """

    request: EngineRequest
    seed: int
    max_tokens: int
    end_token_ids: frozenset[int]
    order: tuple[int, int]
    arrived_s: float
    deadline_s: float | None
    tokens: list[int]
    num_cached: int = 0
    pages: Pages = ()
    chain: PrefixChain | None = None
    num_named: int = 0
    num_covered: int = 0
    output_counts: Counter[int] = field(default_factory=Counter)
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    first_output: bool = True
    queue_s: float | None = None
    first_token_s: float | None = None  # known where the request is traced

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_cached

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions still lack log-probabilities; a replay's first engine has sent them already."""
        return (
            self.sampling.prompt_logprobs is not None
            and not self.request.output_token_ids
            and len(self.prompt_logprobs) < self.num_prompt_tokens
        )

    def hold(self, pages: Pages, block_size: int) -> None:
        """Take `pages` for those it has; `num_covered` is up to which position they reach in every group."""
        self.pages = pages
        self.num_covered = num_covered(pages, block_size)

    def append(self, token_id: int) -> None:
        """Add a sampled token; it is pending until the next step has cached it."""
        self.tokens.append(token_id)
        self.output_counts[token_id] += 1
