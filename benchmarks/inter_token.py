"""How long readers wait between two tokens while long prompts come in, against decoding alone; one engine, in process.

python -m benchmarks.inter_token --model models/llama4-mini [--slowdown 2]
"""

import argparse
import time
from pathlib import Path
from statistics import quantiles

from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.engine import EngineCore
from llama4_dist.engine.options import EngineOptions
from llama4_dist.request import EngineRequest, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/llama4-mini"))
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=700, help="tokens of each long prompt")
    parser.add_argument("--steps", type=int, default=150, help="decode steps measured alone")
    parser.add_argument("--prompts", type=int, default=6, help="long prompts, one after the other")
    parser.add_argument("--slowdown", type=float, nargs="*", default=[2.0, float("inf")])
    arguments = parser.parse_args()
    print("slowdown  alone p50   p99    beside p50   p99  (ms)  p99 ratio  prompt tokens/s  steps")
    for slowdown in arguments.slowdown:
        options = EngineOptions(max_decode_slowdown=slowdown, num_blocks=4096)
        engine = build_single_process(arguments.model, options=options, num_threads=1)
        measure(engine.core, slowdown, arguments)
        engine.close()


def measure(core: EngineCore, slowdown: float, arguments: argparse.Namespace) -> None:
    """Print one row."""
    for reader in range(arguments.readers):
        core.add(_request(f"reader{reader}", range(reader, reader + 8), max_tokens=900))
    for _ in range(20):
        core.step()
    alone = [_timed_step(core) for _ in range(arguments.steps)]
    beside: list[float] = []
    for number in range(arguments.prompts):
        core.add(_request(f"long{number}", range(number, number + arguments.prompt), max_tokens=1))
        while core.scheduler.get(f"long{number}") is not None:
            beside.append(_timed_step(core))
    ratio = _percentile(beside, 99) / _percentile(alone, 99)
    rate = arguments.prompts * arguments.prompt / sum(beside)
    columns = (
        *(1e3 * _percentile(times, at) for times in (alone, beside) for at in (50, 99)),
        ratio,
        rate,
        len(beside),
    )
    print(f"{slowdown:8.1f}" + "".join(f"{value:10.2f}" for value in columns))


def _timed_step(core: EngineCore) -> float:
    started_s = time.perf_counter()
    core.step()
    return time.perf_counter() - started_s


def _percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def _request(name: str, tokens: range, *, max_tokens: int) -> EngineRequest:
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=tuple(100 + t % 3000 for t in tokens), sampling=sampling)


if __name__ == "__main__":
    main()
