"""Serves a scripted engine until signalled; prints the port, and what remained at the end."""

import asyncio
import sys

from llama4_dist.gateway.run import serve
from llama4_dist.gateway.settings import GatewaySettings
from tests.gateway.scripted_engine import ScriptedEngine


def main() -> None:
    engine = ScriptedEngine(step_s=float(sys.argv[1]))
    settings = GatewaySettings(address="127.0.0.1:0", drain_timeout_s=20.0)
    asyncio.run(serve(engine, None, settings, on_ready=lambda gateway: print(gateway.port, flush=True)))
    engine.close()
    print("stopped", engine.num_held, flush=True)


if __name__ == "__main__":
    main()
