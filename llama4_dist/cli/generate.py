"""`llama4-dist generate`: continue prompts, streaming text to the terminal or JSON lines to a script."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llama4_dist.cli.backend import Backend, open_client
from llama4_dist.cli.output import console, print_json, reporting
from llama4_dist.cli.request_flags import GenerateFlags, SamplingFlags
from llama4_dist.client import Client
from llama4_dist.errors import ConfigError
from llama4_dist.request import Completion, Prompt, Sampling


def run_generate(flags: GenerateFlags, sampling_flags: SamplingFlags, backend: Backend) -> None:
    """Run each prompt in turn."""
    with reporting(backend.as_json):
        prompts = read_prompts(flags.prompt, flags.token_ids)
        sampling = sampling_flags.sampling(max_tokens=flags.max_tokens, n=flags.n, logprobs=flags.logprobs)
        with open_client(backend) as client:
            for prompt in prompts:
                if backend.as_json:
                    print_json(completion_json(client.generate(prompt, sampling)))
                else:
                    show_stream(client, prompt, sampling)


def read_prompts(prompt: Sequence[str] | None, token_ids: str | None) -> list[Prompt]:
    """Take prompts from the arguments, the token ids, or standard input; raise ConfigError for bad ids."""
    if token_ids is not None:
        if prompt:
            raise ConfigError("give a prompt or --token-ids, not both")
        try:
            return [[int(part) for part in token_ids.split(",")]]
        except ValueError:
            raise ConfigError(f"--token-ids {token_ids!r} is no comma-separated list of integers") from None
    if not prompt or list(prompt) == ["-"]:
        return [sys.stdin.read()]
    return list(prompt)


def show_stream(client: Client, prompt: Prompt, sampling: Sampling) -> None:
    """Stream one prompt's continuation; several sequences are shown one after the other."""
    if sampling.n > 1:
        for output in client.generate(prompt, sampling).outputs:
            console.rule(f"{output.index} ({output.finish_reason})", align="left")
            console.print(output.text, markup=False, highlight=False, soft_wrap=True)
        return
    if isinstance(prompt, str):
        console.print(prompt, style="bold", end="", markup=False, highlight=False, soft_wrap=True)
    stream = client.stream_generate(prompt, sampling)
    for delta in stream:
        shown = delta.text or ("" if isinstance(prompt, str) else f"{' '.join(map(str, delta.token_ids))} ")
        console.print(shown, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    show_usage(stream.completion)


def show_usage(completion: Completion) -> None:
    """One dim line: tokens and why it ended."""
    usage = completion.usage
    ended = ", ".join(output.finish_reason for output in completion.outputs)
    console.print(f"[dim]{usage.prompt_tokens} + {usage.completion_tokens} tokens, {ended}[/]")


def completion_json(completion: Completion) -> dict[str, Any]:
    """A completion as plain JSON values."""
    return {**asdict(completion), "usage": {**asdict(completion.usage), "total_tokens": completion.usage.total_tokens}}
