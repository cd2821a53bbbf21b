"""The Python API: one object that opens a checkpoint and answers prompts."""

from llama4_dist.llm.api import LLM

__all__ = ["LLM"]
