"""Faults of files and disks, made in place as a failing disk makes them; refuses files that git knows."""

import errno
import hashlib
import os
import random
import subprocess
from pathlib import Path

from tests.faults.fault import Fault, FaultNotVerified, FaultUnavailable

ROOT = Path(__file__).resolve().parents[2]
MAX_DISK_BYTES = 64 * 1024 * 1024
FILLER = "filler"


def digest(path: Path) -> str:
    """Return the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_of(path: Path) -> Path:
    """Return the path, if it lies outside the repository; faults are for copies."""
    if path.resolve().is_relative_to(ROOT):
        raise ValueError(f"{path} lies in the repository: damage a copy of it")
    return path


class FlippedBit(Fault):
    """One flipped bit, by default somewhere in the second half of the file, as `seed` says: there lie weights."""

    def __init__(self, path: Path, *, offset: int | None = None, seed: int = 0, aim: Path | None = None) -> None:
        self._path, self._aim = copy_of(path), copy_of(aim or path)
        num_bytes = min(path.stat().st_size, self._aim.stat().st_size)
        self.offset = random.Random(seed).randrange(num_bytes // 2, num_bytes) if offset is None else offset
        self._mask = 1 << random.Random(seed).randrange(8)
        self._whole = digest(path)
        self._is_flipped = False

    def inject(self) -> None:
        self._flip()
        self._is_flipped = True

    def verify(self) -> None:
        if digest(self._path) == self._whole:
            raise FaultNotVerified(f"{self._path.name} is as it was")

    def heal(self) -> None:
        if self._is_flipped:
            self._flip()
            self._is_flipped = False

    def verify_healed(self) -> None:
        if digest(self._path) != self._whole:
            raise FaultNotVerified(f"{self._path.name} is not what it was")

    def _flip(self) -> None:
        with self._aim.open("r+b") as file:  # in place: a mapping of the file sees it too
            byte = os.pread(file.fileno(), 1, self.offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ self._mask]), self.offset)


class Truncated(Fault):
    """A file cut to `num_bytes` in place: reading a mapping of it beyond ends in SIGBUS."""

    def __init__(self, path: Path, *, num_bytes: int, aim: Path | None = None) -> None:
        self._path, self._aim, self._num_bytes = copy_of(path), copy_of(aim or path), num_bytes
        if not 0 <= num_bytes < path.stat().st_size:
            raise ValueError(f"{num_bytes=} does not cut {path.name} of {path.stat().st_size} bytes")
        self._whole = digest(path)
        self._tail: bytes | None = None

    def inject(self) -> None:
        with self._aim.open("rb") as file:
            file.seek(self._num_bytes)
            self._tail = file.read()
        os.truncate(self._aim, self._num_bytes)

    def verify(self) -> None:
        if (size := self._path.stat().st_size) != self._num_bytes:
            raise FaultNotVerified(f"{self._path.name} has {size} bytes, not {self._num_bytes}")

    def heal(self) -> None:
        if self._tail is not None:
            with self._aim.open("r+b") as file:
                file.seek(self._num_bytes)
                file.write(self._tail)
            self._tail = None

    def verify_healed(self) -> None:
        if digest(self._path) != self._whole:
            raise FaultNotVerified(f"{self._path.name} is not what it was")


class Swapped(Fault):
    """Two files under each other's name. `aim` is the file that `first` is really swapped with."""

    def __init__(self, first: Path, second: Path, *, aim: Path | None = None) -> None:
        self._first, self._second, self._aim = copy_of(first), copy_of(second), copy_of(aim or second)
        self._digests = digest(first), digest(second)
        if self._digests[0] == self._digests[1]:
            raise ValueError(f"{first.name} and {second.name} are alike: a swap would change nothing")
        self._is_swapped = False

    def inject(self) -> None:
        self._swap()
        self._is_swapped = True

    def verify(self) -> None:
        self._expect(self._digests[::-1], "have not changed places")

    def heal(self) -> None:
        if self._is_swapped:
            self._swap()
            self._is_swapped = False

    def verify_healed(self) -> None:
        self._expect(self._digests, "are not where they were")

    def _expect(self, digests: tuple[str, ...], complaint: str) -> None:
        if (digest(self._first), digest(self._second)) != digests:
            raise FaultNotVerified(f"{self._first.name} and {self._second.name} {complaint}")

    def _swap(self) -> None:
        aside = self._first.with_name(f"{self._first.name}.aside")
        self._first.rename(aside)
        if self._aim != self._first:
            self._aim.rename(self._first)
        aside.rename(self._aim)


class SmallDisk:
    """A file system of a few megabytes at `folder`, in memory, while entered."""

    def __init__(self, folder: Path, *, num_bytes: int = 1024 * 1024) -> None:
        if not 0 < num_bytes <= MAX_DISK_BYTES:
            raise ValueError(f"{num_bytes=}: choose up to {MAX_DISK_BYTES}")
        folder.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "llama4-small-disk", str(folder)]
        try:
            subprocess.run(mount, check=True, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            raise FaultUnavailable(f"no tmpfs can be mounted: {getattr(error, 'stderr', error)}") from error
        self.folder = folder

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        # Lazily: a victim that still has a file open there must not keep the test from ending.
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True, capture_output=True, timeout=30)


class FullDisk(Fault):
    """Fills a small disk to its last byte, and frees what it filled."""

    def __init__(self, folder: Path, *, aim: Path | None = None) -> None:
        self._folder, self._aim = folder, aim or folder
        for each in {self._folder, self._aim}:
            state = os.statvfs(each)
            if not each.is_mount() or state.f_blocks * state.f_frsize > MAX_DISK_BYTES:
                raise ValueError(f"{each} is no small disk: only one made for the test is filled")

    def inject(self) -> None:
        with (self._aim / FILLER).open("wb", buffering=0) as file:
            for num_bytes in (65536, 4096, 1):
                while not is_full(file.fileno(), bytes(num_bytes)):
                    pass

    def verify(self) -> None:
        if self._accepts():
            raise FaultNotVerified(f"{self._folder} still takes what is written")

    def heal(self) -> None:
        (self._aim / FILLER).unlink(missing_ok=True)

    def verify_healed(self) -> None:
        if not self._accepts():
            raise FaultNotVerified(f"{self._folder} is still full")

    def _accepts(self) -> bool:
        probe = self._folder / "probe"
        try:
            with probe.open("wb", buffering=0) as file:
                return not is_full(file.fileno(), bytes(1))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        finally:
            probe.unlink(missing_ok=True)


def is_full(descriptor: int, content: bytes) -> bool:
    """Write; return whether the disk had no room for all of it."""
    try:
        return os.write(descriptor, content) < len(content)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return True
