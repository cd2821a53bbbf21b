"""What `generate` and `chat` are asked for on the command line, and the Sampling made of it."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from llama4_dist.request import Sampling

MaxTokens = Annotated[int | None, typer.Option(help="Default: what the context still holds.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateFlags:
    """Prompts, and what is wanted of each."""

    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; '-' or none reads standard input.")] = None
    token_ids: Annotated[str | None, typer.Option(help="Prompt as comma-separated token ids.")] = None
    max_tokens: MaxTokens = 128
    n: Annotated[int, typer.Option("-n", help="Sequences per prompt.")] = 1
    logprobs: Annotated[int | None, typer.Option(help="Return the k likeliest tokens.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFlags:
    """What is said, and how long an answer may be."""

    message: Annotated[str | None, typer.Argument(help="One message; without it the chat is interactive.")] = None
    system: Annotated[str | None, typer.Option(help="System message.")] = None
    max_tokens: MaxTokens = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """Fields of `Sampling`; None is left to the checkpoint or the server."""

    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the checkpoint's own, else 1.")] = (
        None
    )
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling mass.")] = None
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 is off.")] = 0
    seed: Annotated[int | None, typer.Option(help="Fixes every draw.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be given several times.")] = None

    def sampling(self, **more: Any) -> Sampling:
        """Build a Sampling from what was given; `more` are fields that the command has flags of its own for."""
        given = {name: value for name, value in {**asdict(self), **more}.items() if value is not None}
        return Sampling(**{**given, "stop": tuple(self.stop or ())})  # typer gives a list
