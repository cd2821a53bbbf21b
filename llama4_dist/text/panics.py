"""Turns a panic of a Rust library into one of our errors at the place where the library was called."""

from collections.abc import Iterator
from contextlib import contextmanager

from llama4_dist.errors import Llama4Error


@contextmanager
def raised_instead_of_a_panic(error: Llama4Error) -> Iterator[None]:
    """Raise `error` if the block panics or fails.

    pyo3's PanicException derives from BaseException and has no importable name, so `except Exception` lets it pass
    and it would end the process's main loop.
    """
    try:
        yield
    except BaseException as failure:
        if isinstance(failure, Exception) or type(failure).__name__ == "PanicException":
            raise error from failure
        raise
