"""Lets the threads of a fake controller end as those of a killed process do: by SystemExit, without a word."""

import threading

import pytest


@pytest.fixture(scope="session", autouse=True)
def threads_may_exit() -> None:
    hook = threading.excepthook
    # Stays in place: some of them look up only after the last test. pytest takes its own hook away at the end.
    threading.excepthook = lambda args: None if args.exc_type is SystemExit else hook(args)
