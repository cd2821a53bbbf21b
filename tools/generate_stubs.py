"""Generate the Python stubs of every .proto under protos/; `--check` reports drift and writes nothing."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc_tools
from google.longrunning import operations_proto_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"
OPERATIONS = Path(operations_proto_pb2.__file__).with_name("operations_proto.proto")
GOOGLE_APIS = OPERATIONS.parents[2]  # googleapis-common-protos, beside its Python modules


@contextmanager
def include_paths() -> Iterator[list[str]]:
    """Yield protoc's include arguments.

    The wheel holds operations.proto under the name operations_proto.proto, but its Python module registers the real
    one; a copy under that name is what protos can import.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "google" / "longrunning"
        folder.mkdir(parents=True)
        shutil.copyfile(OPERATIONS, folder / "operations.proto")
        yield [f"-I{place}" for place in (PROTOS, directory, GOOGLE_APIS, WELL_KNOWN)]


def generate(destination: Path) -> None:
    """Run protoc over all protos; `_pb2_grpc.py` only for files that define a service."""
    protos = sorted(PROTOS.rglob("*.proto"))
    services = [proto for proto in protos if "\nservice " in proto.read_text()]
    with include_paths() as include:
        run_protoc([*include, f"--python_out={destination}", f"--pyi_out={destination}", *map(str, protos)])
        run_protoc([*include, f"--grpc_python_out={destination}", *map(str, services)])


def write_image(file: Path) -> None:
    """Write all protos with their imports as one descriptor set, for tools that do not find the imports themselves."""
    file.parent.mkdir(parents=True, exist_ok=True)
    protos = map(str, sorted(PROTOS.rglob("*.proto")))
    with include_paths() as include:
        run_protoc([*include, "--include_imports", "--include_source_info", f"--descriptor_set_out={file}", *protos])


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
    parser.add_argument("--image", type=Path, help="write a descriptor set to this file and no stubs")
    arguments = parser.parse_args()
    if arguments.image is not None:
        write_image(arguments.image)
        return 0
    if not arguments.check:
        generate(ROOT)
        return 0
    stale = drift()
    for name in stale:
        print(f"stale: {name}: run `python tools/generate_stubs.py`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
