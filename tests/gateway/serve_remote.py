"""Serves attention workers at given addresses, as one of several gateways of a cluster; prints the port."""

import asyncio
import sys
from pathlib import Path

from llama4_dist.engine.group import EngineGroup
from llama4_dist.gateway.engine_ids import engine_id_key
from llama4_dist.gateway.run import serve
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.rpc.remote_engine import RemoteEngine
from llama4_dist.text.tokenizer import load_tokenizer


def main() -> None:
    secret, model_dir, *addresses = sys.argv[1:]
    engine = EngineGroup([RemoteEngine(address, secret=secret.encode()) for address in addresses])
    settings = GatewaySettings(address="127.0.0.1:0", engine_id_key=engine_id_key(secret.encode()))
    tokenizer = load_tokenizer(Path(model_dir)) if model_dir else None
    show = lambda gateway: print(f"127.0.0.1:{gateway.port}", flush=True)  # noqa: E731
    asyncio.run(serve(engine, tokenizer, settings, on_ready=show))
    engine.close()


if __name__ == "__main__":
    main()
