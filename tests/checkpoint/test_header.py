import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_dist.checkpoint.header import MAX_HEADER_BYTES, TensorEntry, parse_header, read_header
from llama4_dist.errors import CheckpointError
from tests.checkpoint.shards import entry, safetensors_bytes

pytestmark = pytest.mark.timeout(10)  # a damaged file must be refused within that


def read(path: Path, raw: bytes) -> dict[str, TensorEntry]:
    path.write_bytes(raw)
    with path.open("rb", buffering=0) as file:
        return read_header(file, path.name)


def test_a_well_formed_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry("F16", (), (8, 10)), "a": entry()}
    entries = read(tmp_path / "x.safetensors", safetensors_bytes(header, bytes(10)))
    data_start = 8 + len(json.dumps(header))
    assert {name: (e.start - data_start, e.stop - data_start) for name, e in entries.items()} == {
        "a": (0, 8),
        "b": (8, 10),
    }
    assert entries["a"].shape == (2,)
    assert entries["b"].num_elements == 1


DEEP = b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
WHOLE = safetensors_bytes({"a": entry()}, bytes(8))
DAMAGED: dict[str, tuple[bytes, str]] = {
    "C05 header longer than the file": (
        safetensors_bytes({"a": entry()}, bytes(8), header_bytes=10_000),
        "states a header",
    ),
    "C06 header of no bytes": (safetensors_bytes(b"", bytes(8)), "states a header of 0"),
    "C06 header of 2^63 bytes": (safetensors_bytes({}, header_bytes=2**63), "states a header"),
    "C07 no JSON": (safetensors_bytes(b'{"a": '), "no valid JSON"),
    "C07 not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "no valid JSON"),
    "C07 a list": (safetensors_bytes(b"[]"), "does not start"),
    "C07 blank before the brace": (safetensors_bytes(b" {}"), "does not start"),
    "C07 duplicate keys": (safetensors_bytes(b'{"a": 1, "a": 2}'), "appears twice"),
    "C07 NaN": (safetensors_bytes(b'{"a": NaN}'), "no JSON number"),
    "C07 nested 10000 deep": (safetensors_bytes(DEEP), "nested too deeply"),
    "C07 an integer of 10000 digits": (safetensors_bytes(b'{"a": ' + b"9" * 10_000 + b"}"), "no valid JSON"),
    "C07 a tensor that is no object": (safetensors_bytes({"a": 3}), "exactly dtype"),
    "C07 a key too many": (safetensors_bytes({"a": entry() | {"stride": 1}}, bytes(8)), "exactly dtype"),
    "C07 metadata that is no string": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "C07 a name with a line break": (safetensors_bytes({"a\nb": entry()}, bytes(8)), "printable"),
    "C09 negative offset": (safetensors_bytes({"a": entry(offsets=(-8, 0))}, bytes(8)), "data_offsets"),
    "C09 reversed offsets": (safetensors_bytes({"a": entry(offsets=(8, 0))}, bytes(8)), "spans -8 bytes"),
    "C09 fractional offset": (safetensors_bytes({"a": entry(offsets=(0.0, 8))}, bytes(8)), "data_offsets"),
    "C09 three offsets": (safetensors_bytes({"a": entry(offsets=(0, 8, 8))}, bytes(8)), "data_offsets"),
    "C09 overlap": (safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlaps"),
    "C09 the same bytes twice": (safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "C09 hole": (safetensors_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "hole"),
    "C09 hole at the front": (safetensors_bytes({"a": entry(offsets=(8, 16))}, bytes(16)), "hole"),
    "C09 past the end": (safetensors_bytes({"a": entry()}, bytes(4)), "cut short"),
    "C09 bytes behind the last tensor": (safetensors_bytes({"a": entry()}, bytes(9)), "1 bytes behind"),
    "C09 tensor without elements": (safetensors_bytes({"a": entry(shape=(0,), offsets=(0, 0))}), "positive integers"),
    "C10 shape product beyond 64 bits": (
        safetensors_bytes({"a": entry(shape=(2**32, 2**32, 2**32))}, bytes(8)),
        "needs",
    ),
    "C10 shape product that wraps to 8": (
        safetensors_bytes({"a": entry("U8", (2**62, 4, 8), (0, 8))}, bytes(8)),
        "needs",
    ),
    "C10 dimension beyond 64 bits": (safetensors_bytes({"a": entry(shape=(2**64,))}, bytes(8)), "positive integers"),
    "C10 negative dimensions": (safetensors_bytes({"a": entry(shape=(-1, -2))}, bytes(8)), "positive integers"),
    "C10 boolean dimension": (safetensors_bytes({"a": entry("F64", (True,))}, bytes(8)), "positive integers"),
    "C10 a thousand dimensions": (
        safetensors_bytes({"a": entry(shape=[1] * 1000, offsets=(0, 4))}, bytes(4)),
        "positive integers",
    ),
    "C11 unknown dtype": (safetensors_bytes({"a": entry("F8")}, bytes(8)), "unknown dtype"),
    "C11 dtype that is no string": (safetensors_bytes({"a": entry(["F32"])}, bytes(8)), "unknown dtype"),
    "C12 shape needs fewer bytes": (safetensors_bytes({"a": entry(shape=(1,))}, bytes(8)), "spans 8 bytes"),
    "C13 cut by one byte": (WHOLE[:-1], "cut short"),
    "C13 cut by half": (WHOLE[: len(WHOLE) // 2], "states a header"),
    "C13 cut to four bytes": (WHOLE[:4], "too few"),
    "C13 empty": (b"", "too few"),
    "C16 a pickle by content": (b"\x80\x02}q\x00." + bytes(100), "pickle"),
    "C16 a torch zip by content": (b"PK\x03\x04" + bytes(100), "pickle"),
}


@pytest.mark.parametrize(("raw", "cause"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_refused_in_one_line(tmp_path: Path, raw: bytes, cause: str) -> None:
    with pytest.raises(CheckpointError, match=cause) as caught:
        read(tmp_path / "x.safetensors", raw)
    assert caught.value.file == "x.safetensors"
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


def test_a_header_beyond_25_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER_BYTES * 2)
    with pytest.raises(CheckpointError, match="states a header"), path.open("rb", buffering=0) as file:
        read_header(file, path.name)


@pytest.mark.timeout(60)  # most of it is building the file
def test_more_than_100000_tensors_are_refused() -> None:
    raw = json.dumps({str(i): entry("U8", (1,), (i, i + 1)) for i in range(100_001)}).encode()
    with pytest.raises(CheckpointError, match="100001 tensors"):
        parse_header(raw, file_bytes=8 + len(raw) + 100_001, name="x.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
tensor_fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**63]), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_values,
    }
)


@given(
    header=st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), tensor_fields | json_values, max_size=4),
    num_data=st.integers(0, 64),
)
def test_no_header_does_anything_but_parse_or_raise_checkpoint_error(header: dict[str, Any], num_data: int) -> None:
    check_outcome(json.dumps(header).encode(), num_data)


@given(raw=st.binary(max_size=64).map(lambda tail: b"{" + tail), num_data=st.integers(0, 8))
def test_no_bytes_do_anything_but_parse_or_raise_checkpoint_error(raw: bytes, num_data: int) -> None:
    check_outcome(raw, num_data)


@given(position=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
def test_no_changed_byte_does_anything_but_parse_or_raise_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    raw = bytearray(WHOLE)
    raw[position] = value
    try:
        entries = read(tmp_path_factory.getbasetemp() / "mutated.safetensors", bytes(raw))
    except CheckpointError:
        return
    assert all(e.stop <= len(raw) for e in entries.values())


def check_outcome(raw: bytes, num_data: int) -> None:
    file_bytes = 8 + len(raw) + num_data
    try:
        entries = parse_header(raw, file_bytes=file_bytes, name="x.safetensors")
    except CheckpointError:
        return
    assert sum(e.num_bytes for e in entries.values()) == num_data
    assert all(8 + len(raw) <= e.start < e.stop <= file_bytes for e in entries.values())
    assert all(math.prod(e.shape) >= 1 for e in entries.values())
