"""This project's engine in one process, as a contender. Arguments: checkpoint, threads, most sequences, format of
weights (stored by default).
"""

import sys
from pathlib import Path

from benchmarks.contenders.answering import answer, take_stdout
from benchmarks.engine_timer import EngineTimer
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.version import __version__

KV_CACHE_BYTES = 256 << 20


class OneProcess(EngineTimer):
    """The engine with its experts behind an inproc link."""

    version = f"llama4-dist {__version__}"


def main() -> None:
    pipe = take_stdout()
    model_dir, num_threads, max_num_seqs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options = EngineOptions(kv_cache_bytes=KV_CACHE_BYTES, max_num_seqs=max_num_seqs)
    weights = sys.argv[4] if len(sys.argv) > 4 else "stored"
    engine = build_single_process(model_dir, weights=weights, options=options, num_threads=num_threads)
    try:
        answer(OneProcess(engine), pipe)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
