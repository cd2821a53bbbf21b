"""Serves an engine over a fake model until its input ends; prints the address."""

import sys
import time

from llama4_dist.engine.local import LocalEngine
from llama4_dist.rpc.engine_service import EngineServer
from tests.engine.fake_model import fake_core


def main() -> None:
    step_s, ttl_s, port, secret = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    engine = LocalEngine(fake_core(num_blocks=256, max_context=512))
    engine.core.runner.model.before_forward = lambda batch: time.sleep(step_s)  # type: ignore[attr-defined]
    server = EngineServer(engine, host="127.0.0.1", secret=secret.encode(), port=port, resume_ttl_s=ttl_s)
    print(server.address, flush=True)
    sys.stdin.read()
    server.close()
    engine.close()


if __name__ == "__main__":
    main()
