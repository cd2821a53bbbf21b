"""`llama4-dist chat`: one message, or a conversation at the terminal."""

import typer

from llama4_dist.cli.backend import Backend, open_client
from llama4_dist.cli.generate import completion_json, show_usage
from llama4_dist.cli.output import console, print_json, reporting
from llama4_dist.cli.request_flags import ChatFlags, SamplingFlags
from llama4_dist.client import Client
from llama4_dist.request import Completion, Message, Sampling


def run_chat(flags: ChatFlags, sampling_flags: SamplingFlags, backend: Backend) -> None:
    """Answer one message, or go on until an empty line."""
    with reporting(backend.as_json):
        sampling = sampling_flags.sampling(max_tokens=flags.max_tokens)
        messages = [Message(role="system", content=flags.system)] if flags.system else []
        with open_client(backend) as client:
            if flags.message is not None:
                messages.append(Message(role="user", content=flags.message))
                _answer(client, messages, sampling, backend.as_json)
                return
            while said := _ask():
                messages.append(Message(role="user", content=said))
                completion = _answer(client, messages, sampling, backend.as_json)
                messages.append(Message(role="assistant", content=completion.text))


def _ask() -> str:
    try:
        return str(typer.prompt("you", prompt_suffix=" › ", default="", show_default=False, err=True))
    except typer.Abort:
        return ""


def _answer(client: Client, messages: list[Message], sampling: Sampling, as_json: bool) -> Completion:
    if as_json:
        completion = client.chat(messages, sampling)
        print_json(completion_json(completion))
        return completion
    stream = client.stream_chat(messages, sampling)
    for delta in stream:
        console.print(delta.text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    show_usage(stream.completion)
    return stream.completion
