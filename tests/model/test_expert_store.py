"""Experts that come and go on one host: the same bits, within the capacity, and their memory comes back."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.errors import CheckpointError, UnavailableError
from llama4_dist.model.expert import Experts
from llama4_dist.model.expert_store import ExpertStore
from llama4_dist.model.held_expert import Pair
from tests.checkpoints import make_checkpoint
from tests.native.compiler import needs_compiler
from tests.plain_experts import plain

D = 64
LAYERS, EXPERTS = range(4), range(16)
PAIRS = [(layer, expert) for layer in LAYERS for expert in EXPERTS]
X_RD = torch.randn(6, D, generator=torch.Generator().manual_seed(0))
MIB = 1024 * 1024


@pytest.fixture(scope="module", params=["fused", "per_expert"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scout"), "scout", layout=request.param)


def store(model_dir: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> ExpertStore:
    return ExpertStore(Checkpoint.open(model_dir), dtype=dtype, device="cpu", **options)


def answer(experts: ExpertStore, pair: Pair) -> torch.Tensor:
    layer, expert = pair
    x_RD = X_RD.to(experts._experts.dtype)
    out_RD = torch.full_like(x_RD, float("nan"))
    experts(layer, ((expert, len(x_RD)),), x_RD, out_RD)
    return out_RD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_that_comes_back_gives_the_same_bits(model_dir: Path, dtype: torch.dtype) -> None:
    experts = store(model_dir, dtype=dtype)
    experts.add(PAIRS)
    assert experts.holds == set(PAIRS)
    before = {pair: answer(experts, pair) for pair in PAIRS}
    assert experts.remove(PAIRS) == len(PAIRS) * experts._cut.most_bytes
    assert (experts.holds, experts.bytes_held) == (frozenset(), 0)
    assert experts.remove(PAIRS) == 0
    experts.add(PAIRS)
    experts.add(PAIRS)
    assert all(torch.equal(answer(experts, pair), before[pair]) for pair in PAIRS)
    assert experts.bytes_held == len(PAIRS) * experts._cut.most_bytes == len(PAIRS) * 3 * D * 96 * dtype.itemsize


def test_experts_come_and_go_while_another_thread_computes(model_dir: Path) -> None:
    experts = store(model_dir)
    stays, passing = PAIRS[::2], PAIRS[1::2]
    experts.add(stays)
    expected = {pair: answer(experts, pair) for pair in stays}
    wrong: list[Pair] = []
    done = threading.Event()

    def compute() -> None:
        for turn, pair in enumerate(itertools.cycle(stays)):
            if not torch.equal(answer(experts, pair), expected[pair]):
                wrong.append(pair)
            if done.is_set() and turn > 50:
                return

    thread = threading.Thread(target=compute)
    thread.start()
    for _ in range(10):
        experts.add(passing)
        assert experts.fingerprint(passing[0])
        experts.remove(passing)
    done.set()
    thread.join()
    assert wrong == []
    assert experts.holds == set(stays)


def test_rows_under_way_end_well_when_their_expert_goes(model_dir: Path) -> None:
    experts = store(model_dir)
    experts.add([(1, 2)])
    weights = plain(experts._experts.weights(1, 2))
    before = weights.down_FD.clone()
    experts.remove([(1, 2)])
    assert torch.equal(weights.down_FD, before), "whoever has them in hand reads the file again"


def test_more_than_the_capacity_is_refused_and_nothing_of_it_is_mapped(model_dir: Path) -> None:
    size = 3 * D * 96 * 4
    experts = store(model_dir, capacity_bytes=3 * size + 1)
    experts.add(PAIRS[:2])
    for bring in (experts.add, experts.adopt):
        with pytest.raises(
            UnavailableError, match=f"2 experts of {2 * size} bytes together do not fit: {size + 1} of"
        ) as caught:
            bring(PAIRS[2:4])
        assert caught.value.reason == "NO_ROOM"
        assert experts.holds == set(PAIRS[:2])
    experts.adopt(PAIRS[1:3])  # one of them is here already
    experts.remove(PAIRS[:1])
    experts.add(PAIRS[3:4])
    assert experts.holds == set(PAIRS[1:4])


def test_keeping_lets_go_of_all_else_and_what_was_adopted_stays_on_demand(model_dir: Path) -> None:
    experts = store(model_dir)
    experts.add(PAIRS[:4])
    experts.adopt(PAIRS[3:6])  # the first of them was given to this host before
    experts.add(PAIRS[5:7])  # the first of them was adopted before
    assert experts.keep(PAIRS[:2], and_adopted=True) == 3 * experts._cut.most_bytes
    assert experts.holds == {*PAIRS[:2], PAIRS[4], PAIRS[5]}
    assert experts.keep(PAIRS[:3]) == 2 * experts._cut.most_bytes
    assert experts.holds == set(PAIRS[:2])
    experts.add(PAIRS[4:5])
    experts.keep(PAIRS[:2], and_adopted=True)
    assert experts.holds == set(PAIRS[:2]), "adopted is a word for once"


def test_keeping_waits_for_what_is_being_added(model_dir: Path) -> None:
    experts, reached, go_on = store(model_dir), threading.Event(), threading.Event()
    experts.add(PAIRS[:1])

    def hold(num_done: int) -> None:
        reached.set()
        assert go_on.wait(60)

    adding = threading.Thread(target=experts.add, args=(PAIRS[:5], hold))
    adding.start()
    assert reached.wait(60)
    keeping = threading.Thread(target=experts.keep, args=(PAIRS[:1],))
    keeping.start()
    go_on.set()
    adding.join()
    keeping.join()
    assert experts.holds == set(PAIRS[:1])


def test_progress_is_told_of_what_is_new(model_dir: Path) -> None:
    experts, told = store(model_dir), list[int]()
    experts.add(PAIRS[:3])
    experts.add(PAIRS[:5], told.append)
    assert told == [1, 2]


def test_stores_of_one_checkpoint_have_the_same_fingerprints_and_experts_have_different_ones(model_dir: Path) -> None:
    first, second = store(model_dir), store(model_dir)
    for experts in (first, second):
        experts.add(PAIRS)
    prints = [first.fingerprint(pair) for pair in PAIRS]
    assert [second.fingerprint(pair) for pair in PAIRS] == prints
    assert len(set(prints)) == len(PAIRS)


def flip(path: Path, find: Callable[[bytes], int]) -> None:
    """Change the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[find(bytes(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("part", ["gate_DF", "up_DF", "down_FD"])
def test_one_bit_of_one_weight_changes_the_fingerprint(tmp_path: Path, layout: str, part: str) -> None:
    path = make_checkpoint(tmp_path, "scout", layout=layout)
    experts = store(path)
    experts.add(PAIRS[:2])
    before = [experts.fingerprint(pair) for pair in PAIRS[:2]]
    needle = getattr(experts._experts.weights(*PAIRS[1]), part)[40, 40].clone().numpy().tobytes()
    (shard,) = [one for one in path.glob("*.safetensors") if needle in one.read_bytes()]
    assert shard.read_bytes().count(needle) == 1
    flip(shard, lambda content: content.index(needle))
    changed = store(path)
    changed.add(PAIRS[:2])
    after = [changed.fingerprint(pair) for pair in PAIRS[:2]]
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


def test_a_fingerprint_is_taken_anew_of_what_is_mapped_anew(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "scout", num_shards=1)
    experts = store(path)
    experts.add(PAIRS[:1])
    before = experts.fingerprint(PAIRS[0])
    needle = plain(experts._experts.weights(*PAIRS[0])).down_FD[1, 1].clone().numpy().tobytes()
    experts.remove(PAIRS[:1])
    with (path / "model.safetensors").open("r+b") as shard:  # in place: the mapping sees it
        content = shard.read()
        shard.seek(content.index(needle))
        shard.write(bytes([needle[0] ^ 1]))
    experts.add(PAIRS[:1])
    assert experts.fingerprint(PAIRS[0]) != before


def test_an_expert_of_a_file_that_is_gone_names_it(model_dir: Path, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "scout")
    experts = store(path)
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        experts.add(PAIRS[:1])
    assert experts.holds == frozenset()


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_removing_gives_memory_back_that_was_touched_and_only_that(tmp_path: Path, layout: str) -> None:
    path = make_checkpoint(
        tmp_path, "scout", layout=layout, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
        no_rope_layers=[1, 0],
    )  # fmt: skip
    experts = store(path)
    size = experts._cut.most_bytes  # 6 MiB
    pairs = [(layer, expert) for layer in range(2) for expert in range(8)]

    def resident() -> int:
        return resident_bytes(path)

    experts.add(pairs)
    stays, go = pairs[::8], [pair for pair in pairs if pair not in pairs[::8]]
    assert resident() < MIB, "mapping alone takes no memory"
    for pair in pairs:
        experts.fingerprint(pair)
    touched = resident()
    assert touched > 0.9 * len(pairs) * size > 64 * MIB
    assert experts.remove(go) == len(go) * size
    left = resident()
    # The kernel maps a file in pieces of up to 2 MiB, and lets go of whole ones at either end of an expert.
    assert left < len(stays) * size + 16 * MIB
    assert left > 0.5 * len(stays) * size, "what stays is not thrown out"


@needs_compiler
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_in_int8_what_was_mapped_is_given_back_once_it_is_copied(tmp_path: Path, layout: str) -> None:
    path = make_checkpoint(
        tmp_path, "scout", layout=layout, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
        no_rope_layers=[1, 0],
    )  # fmt: skip
    experts = store(path, weight_format="int8")
    pairs = [(layer, expert) for layer in range(2) for expert in range(8)]
    assert experts._cut.most_bytes == 3 * 512 * 1024 + 4 * (2 * 1024 + 512)
    experts.add(pairs)
    first, second = pairs[::2], pairs[1::2]
    x_RD = torch.randn(2, 512)
    for layer, expert in first:
        experts(layer, ((expert, 2),), x_RD, torch.empty_like(x_RD))
    # The kernel maps a file in pieces of up to 2 MiB, and lets go of whole ones at either end of an expert.
    assert resident_bytes(path) < 16 * MIB, "of 48 that were read"
    for pair in second:
        experts.fingerprint(pair)
    assert resident_bytes(path) < 16 * MIB, "of 96 that were read"
    assert isinstance(experts._experts, Experts)
    assert experts._experts.quantisation_error.num_outputs == len(pairs) * (2 * 1024 + 512)


@needs_compiler
def test_a_fingerprint_names_the_format_even_where_answers_are_equal(tmp_path: Path) -> None:
    """Weights that are integers times a power of two, 127 the largest of each output, lose nothing in int8."""
    path = make_checkpoint(tmp_path, "scout")
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = torch.randint(-127, 128, tensors[name].shape) / 1024
            tensors[name][:, 0] = 127 / 1024
        save_file(tensors, shard, metadata={"format": "pt"})
    stored, int8 = store(path), store(path, weight_format="int8")
    for experts in (stored, int8):
        experts.add(PAIRS[:1])
    assert torch.equal(answer(stored, PAIRS[0]), answer(int8, PAIRS[0]))
    assert stored.fingerprint(PAIRS[0]) != int8.fingerprint(PAIRS[0])


@needs_compiler
def test_int8_has_one_fingerprint_everywhere(model_dir: Path) -> None:
    stored, first, second = store(model_dir), *(store(model_dir, weight_format="int8") for _ in range(2))
    for experts in (stored, first, second):
        experts.add(PAIRS[:3])
    answer(second, PAIRS[0])  # one has computed with it, the other has not
    for pair in PAIRS[:3]:
        assert first.fingerprint(pair) == second.fingerprint(pair) != stored.fingerprint(pair)
        assert torch.equal(answer(first, pair), answer(second, pair))


def resident_bytes(path: Path) -> int:
    mapped = psutil.Process().memory_maps(grouped=True)
    return sum(one.rss for one in mapped if one.path.startswith(str(path)))
