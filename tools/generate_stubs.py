"""Generate the Python stubs of every .proto under protos/; `--check` reports drift and writes nothing."""

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def generate(destination: Path) -> None:
    """Run protoc over all protos; `_pb2_grpc.py` only for files that define a service."""
    protos = sorted(PROTOS.rglob("*.proto"))
    services = [proto for proto in protos if "\nservice " in proto.read_text()]
    include = [f"-I{PROTOS}", f"-I{WELL_KNOWN}"]
    run_protoc([*include, f"--python_out={destination}", f"--pyi_out={destination}", *map(str, protos)])
    run_protoc([*include, f"--grpc_python_out={destination}", *map(str, services)])


def run_protoc(arguments: list[str]) -> None:
    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit("protoc failed: see its message above")


def stubs_under(root: Path) -> dict[str, bytes]:
    """Relative path → bytes of every generated file below the package."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for pattern in ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
        for path in (root / "llama4_dist").rglob(pattern)
    }


def drift() -> list[str]:
    """Names of committed stubs that differ from, or are missing against, what the protos generate."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        wanted, present = stubs_under(Path(directory)), stubs_under(ROOT)
    return sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the committed stubs are stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    stale = drift()
    for name in stale:
        print(f"stale: {name}: run `python tools/generate_stubs.py`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
