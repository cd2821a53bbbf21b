"""A gateway over remote workers in a process of its own, so that a test can kill or stop it."""

from tests.rpc.worker_process import SECRET, ServingProcess


def spawn_gateway(*workers: str, model_dir: object = "") -> ServingProcess:
    """Start a gateway over the workers at these addresses."""
    return ServingProcess("tests.gateway.serve_remote", SECRET.decode(), model_dir, *workers)
