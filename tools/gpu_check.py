"""Checks every kernel against float64 and times it, in one call on one card; needs torch, Triton, numpy, safetensors.

`python tools/gpu_check.py`, or `make gpu-check`. Without a card: `--device cpu --quick` under TRITON_INTERPRET=1 runs
the checks on tiny shapes in Triton's interpreter and times nothing.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402 - the repository's own modules need the path above
from gpu_checks.attention import check_attention, time_attention  # noqa: E402
from gpu_checks.ceilings import check_ceilings  # noqa: E402
from gpu_checks.decode import check_batches, check_decode, check_transformers  # noqa: E402
from gpu_checks.engine import check_engine  # noqa: E402
from gpu_checks.harness import HEADER, Session, format_row  # noqa: E402
from gpu_checks.hosts import check_hosts  # noqa: E402
from gpu_checks.model import check_model, check_model_bits  # noqa: E402
from gpu_checks.products import (  # noqa: E402
    check_grouped_gemm,
    check_same_bits,
    check_small_products,
    check_stream,
)
from gpu_checks.quantized import check_quantized, check_quantized_bits, time_quantized  # noqa: E402
from gpu_checks.rows import check_rows  # noqa: E402

CHECKS = {
    "small": check_small_products,
    "rows": check_rows,
    "attention": check_attention,
    "bits": check_same_bits,
    "quantized": check_quantized,
    "quantized-bits": check_quantized_bits,
    "model": check_model,
    "model-bits": check_model_bits,
    "engine": check_engine,
    "hosts": check_hosts,
}
TIMED = {
    "gemm": check_grouped_gemm,
    "stream": check_stream,
    "attention-time": time_attention,
    "quantized-time": time_quantized,
    "decode": check_decode,
    "batches": check_batches,
    "transformers": check_transformers,
}


SECONDS_PER_CHECK = 120.0  # a check that takes longer hangs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=[*CHECKS, *TIMED, "none"], help="run this check; may be repeated"
    )
    parser.add_argument("--skip", action="append", default=[], choices=[*CHECKS, *TIMED], help="leave this check out")
    parser.add_argument("--quick", action="store_true", help="checks only, no timing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--stack-gb", type=float, default=120.0, help="weights of the decode stack at most, in 1e9 bytes"
    )
    parser.add_argument("--json", type=Path, help="write results here; default $OUT/gpu_check.json where OUT is set")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(20261126)
    session = Session(
        device=torch.device(arguments.device), quick=arguments.quick, stack_bytes=int(arguments.stack_gb * 1e9)
    )
    out = arguments.json or Path(os.environ.get("OUT", tempfile.gettempdir())) / "gpu_check.json"
    if arguments.resume:
        session.load(json.loads(arguments.resume.read_text()))
    elif session.is_cuda:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
        session.run("ceilings", check_ceilings)
    known = CHECKS if arguments.quick or not session.is_cuda else CHECKS | TIMED
    names = [name for name in known if name in (arguments.only or known) and name not in arguments.skip]
    for index, name in enumerate(names):
        watchdog = threading.Timer(SECONDS_PER_CHECK, _give_up, (session, name, out, names[index + 1 :]))
        watchdog.daemon = True
        watchdog.start()
        session.run(name, known[name])
        watchdog.cancel()
        out.write_text(json.dumps(session.as_json(), indent=1))
        if session.is_broken():
            _go_on_in_a_new_process(out, names[index + 1 :])
    return _summary(session)


def _summary(session: Session) -> int:
    """Print what a reader needs first: what failed, what was wanted, the best of each kernel."""
    best = {f"{name}: {tile}" for name, tile in session.best.items()}
    print(f"\n{HEADER}")
    for row in session.rows:
        if row.verdict in ("FAIL", "measured", "other bits") or row.check in best or "wanted" in row.note:
            print(format_row(row))
    failed = sum(row.verdict == "FAIL" for row in session.rows)
    print(f"{len(session.rows)} lines, {failed} failed, {session.seconds():.0f} s")
    return int(failed > 0)


def _give_up(session: Session, name: str, out: Path, rest: list[str]) -> None:
    session.add(name, "FAIL", note=f"did not end within {SECONDS_PER_CHECK:.0f} s")
    out.write_text(json.dumps(session.as_json(), indent=1))
    _go_on_in_a_new_process(out, rest)


def _go_on_in_a_new_process(out: Path, rest: list[str]) -> None:
    """After an illegal access or a hang the device context of this process is of no use."""
    print(f"=== a new process for {rest}", flush=True)
    only = [word for name in rest or ["none"] for word in ("--only", name)]
    os.execv(sys.executable, [sys.executable, *sys.argv, *only, "--resume", str(out)])


if __name__ == "__main__":
    sys.exit(main())
