"""Imports what an expert host needs, once, and forks a host for every order; serves nothing itself.

A process that begins with torch loaded is there in a hundredth of the time.
"""

import ctypes
import json
import os
import signal
import socket
import sys

import torch

from llama4_dist.native.library import library
from tests.matrix.host_process import MAX_MESSAGE, run_host

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(descriptor: int) -> None:
    """Fork until the test's end of the socket closes; the hosts end with this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the dead
    torch.set_num_threads(1)
    library()
    orders = socket.socket(fileno=descriptor)
    orders.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, MAX_MESSAGE, 1)
        if not message:
            return
        if os.fork() == 0:
            orders.close()
            live(message, descriptors[0])
        os.close(descriptors[0])


def live(message: bytes, descriptor: int) -> None:
    """Be a host, and never return."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        run_host(json.loads(message), socket.socket(fileno=descriptor))
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
