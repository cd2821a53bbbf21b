"""Who gets the processor's threads: native passes have a team of their own, and two teams that wait hinder each other.

Measured on two processors: where torch kept its second thread for what little it computes in a step, each of its
operations waited for the team's idle thread and the other way round; a step of 11.4 ms took 15.3.
"""

import torch

_count: int | None = None


def set_count(num_threads: int) -> None:
    """Compute with so many threads, whoever computes."""
    global _count
    _count = num_threads
    torch.set_num_threads(num_threads)


def count() -> int:
    """Return how many threads a native pass takes."""
    return _count or torch.get_num_threads()


def leave_to_native() -> None:
    """Give torch one thread from now on: native passes do the work of a step."""
    set_count(count())
    torch.set_num_threads(1)
