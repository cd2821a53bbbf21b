"""Writes planned shards into a directory with a few threads; config and index come last, when all tensors are there."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from llama4_dist.checkpoint.header import ITEM_BYTES
from llama4_dist.checkpoint.index import INDEX
from llama4_dist.checkpoint.writing.directory import check_holes, check_room, sync
from llama4_dist.checkpoint.writing.moves import Piece, carry_out, pieces
from llama4_dist.checkpoint.writing.shard_plan import ShardPlan, index_json

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Advance = Callable[[int], None]
MAX_THREADS = 4


def write_checkpoint(
    directory: Path, shards: Sequence[ShardPlan], small_files: Mapping[str, bytes | Path], advance: Advance
) -> None:
    """Write the shards, their index if there are several, and the small files (bytes, or a file to copy).

    Every byte is on the disk at the end; `advance` is told the bytes moved since the last call, by several threads.
    """
    for shard in shards:
        _write_shard(directory / shard.file, shard, advance)
    files = dict(small_files)
    if len(shards) > 1:
        files[INDEX] = index_json(shards).encode()
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, directory / name)
        else:
            (directory / name).write_bytes(content)
        sync(directory / name)


def check_disk(stage: Path, shards: Sequence[ShardPlan], num_bytes: int) -> None:
    """Refuse, before the first byte, what the file system cannot take."""
    check_room(stage, num_bytes + sum(len(shard.header) for shard in shards))
    if num_bytes < sum(tensor.num_bytes for shard in shards for tensor, _ in shard.tensors):
        check_holes(stage)
    largest = stage / "largest"
    with largest.open("wb") as file:  # OSError (EFBIG) becomes words in `new_directory`
        file.truncate(max(shard.num_bytes for shard in shards))
    largest.unlink()


class Counter:
    """Adds up the bytes of several threads and tells `progress` (bytes done, bytes in all)."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _write_shard(path: Path, shard: ShardPlan, advance: Advance) -> None:
    with path.open("xb", buffering=0) as file:
        descriptor = file.fileno()
        file.truncate(shard.num_bytes)
        os.pwrite(descriptor, shard.header, 0)
        jobs = _Jobs(_pieces(shard), descriptor, advance)
        if any(tensor.moves for tensor, _ in shard.tensors):
            _run(jobs)
            os.fsync(descriptor)


def _pieces(shard: ShardPlan) -> Iterator[Piece]:
    for tensor, base in shard.tensors:
        for move in tensor.moves:
            yield from pieces(move, base, ITEM_BYTES[tensor.dtype])


class _Jobs:
    """The pieces of one file, taken by several threads in turn until there are none or one of them failed."""

    def __init__(self, left: Iterator[Piece], descriptor: int, advance: Advance) -> None:
        self.stop = threading.Event()
        self._left, self._descriptor, self._advance = left, descriptor, advance
        self._lock = threading.Lock()

    def work(self) -> None:
        try:
            while not self.stop.is_set():
                with self._lock:
                    piece = next(self._left, None)
                if piece is None:
                    return
                carry_out(piece, self._descriptor)
                self._advance(piece.num_bytes)
        except BaseException:
            self.stop.set()
            raise


def _run(jobs: _Jobs) -> None:
    """Raise the first failure; an interrupt ends the threads after the piece they are at."""
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="write") as pool:
        try:  # the threads are told to stop wherever an interrupt comes: leaving the pool waits for them
            futures = [pool.submit(jobs.work) for _ in range(num_threads)]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            jobs.stop.set()
            raise
