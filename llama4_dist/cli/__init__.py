"""The command line, `llama4-dist`; heavy imports (torch, Ray, gRPC) happen inside the commands that need them."""

from llama4_dist.cli.app import main

__all__ = ["main"]
