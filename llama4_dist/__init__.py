"""Distributed inference for the Llama 4 family. Importing the package loads neither torch nor Ray; using `LLM` does."""

from typing import TYPE_CHECKING, Any

from llama4_dist.errors import Llama4Error
from llama4_dist.request import Completion, Message, Sampling
from llama4_dist.version import __version__

if TYPE_CHECKING:
    from llama4_dist.llm import LLM

__all__ = ["LLM", "Completion", "Llama4Error", "Message", "Sampling", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from llama4_dist.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
