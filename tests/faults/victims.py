"""Processes to break: each does one thing all day, says "ready" first, and ends with the test."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPIN = "while True: pass"
IDLE = "import threading\nthreading.Event().wait()"
IDLE_THREADS = "import threading\nfor _ in range(3): threading.Thread(target=threading.Event().wait).start()"
EATS_ON_REQUEST = "import sys\nsys.stdin.readline()\nmeal = b'x' * 200_000_000\nsys.stdin.readline()"


@contextmanager
def victim(code: str = IDLE) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python code in a process of its own; yield it once it runs."""
    program = [sys.executable, "-S", "-c", f"print('ready', flush=True)\n{code}"]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait(60)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
