"""Serves a paced engine until it is told to stop; prints the port, and writes when each step was handed out."""

import argparse
import asyncio
import json
from pathlib import Path

from benchmarks.paced_engine import VOCAB_SIZE, PacedEngine
from llama4_dist.gateway.run import serve
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.text.tokenizer import BOS, Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, required=True)
    parser.add_argument("--running", type=int, required=True, help="sequences at once")
    parser.add_argument("--max-queue-s", type=float)
    parser.add_argument("--times", type=Path, help="write the times of the steps there at the end")
    arguments = parser.parse_args()
    engine = PacedEngine(step_s=arguments.step_ms / 1000, max_running=arguments.running, max_waiting=4096)
    settings = GatewaySettings(
        address="127.0.0.1:0", max_requests=arguments.running + 4096, max_queue_s=arguments.max_queue_s
    )
    # Every token is a word, so that detokenisation is paid for as with a model.
    tokenizer = Tokenizer([b"word "] * VOCAB_SIZE, {BOS: VOCAB_SIZE}, lambda text: [0] * len(text))
    asyncio.run(serve(engine, tokenizer, settings, on_ready=lambda gateway: print(gateway.port, flush=True)))
    engine.close()
    if arguments.times is not None:
        arguments.times.write_text(json.dumps(engine.step_times_s))


if __name__ == "__main__":
    main()
