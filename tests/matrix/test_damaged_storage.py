"""FX21: one host's copy of the weights is cut or changed while it is mapped; the damage stays with that host."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.control_plane.proofs import compare, to_prove
from cluster.planning.movement import Move
from llama4_dist.chaos.faults.fault import must
from llama4_dist.errors import EngineError
from tests.faults.storage import FlippedBit, Truncated
from tests.matrix.conftest import Cases
from tests.matrix.copies import copy_model, down_of, read_header, shards
from tests.matrix.harness import Cluster

MAX_STALL_S = 1.0
MAX_DETECTION_S = 10.0
CHECK_EVERY = 4  # one layer's rows of one expert in each step of four layers
WARM = 12
Make = Callable[..., Cluster]


@pytest.fixture
def copies(model_dir: Path, tmp_path: Path) -> dict[str, Path]:
    """A copy of the checkpoint for each of three hosts."""
    return {f"expert-{index}": copy_model(model_dir, tmp_path / f"copy{index}") for index in range(3)}


def busiest(cluster: Cluster) -> tuple[int, int]:
    """Return the pair with the most rows."""
    rows = [row for host in cluster.hosts.values() for row in host.stats["rows"]]
    layer, expert, _ = max(rows, key=lambda row: row[2])
    return layer, expert


def test_a_shard_cut_while_it_is_mapped_ends_only_the_host_that_maps_it(
    make: Make, cases: Cases, copies: dict[str, Path]
) -> None:
    cluster = make(model_dirs=copies).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_tokens(WARM)
    with ExitStack() as stack:
        for path in shards(copies["expert-1"]):
            stack.enter_context(load.history.fault(Truncated(path, num_bytes=read_header(path)[1])))
        must(lambda: cluster.hosts["expert-1"].process.is_dead, "SIGBUS ended the host", timeout_s=10.0)
        load.wait_for_tokens(WARM)
    assert load.end(label="FX21 cut").added_stall.max_s < MAX_STALL_S
    assert cluster.live == {"expert-0", "expert-2"}
    assert "REPLY_TIMEOUT" not in cluster.stats.lost_hosts, "its end was waited for, not seen"


def test_a_flipped_bit_of_a_second_copy_is_found_before_anybody_is_told_a_wrong_token(
    make: Make, cases: Cases, copies: dict[str, Path]
) -> None:
    cluster = make(model_dirs=copies, cross_check_every=CHECK_EVERY).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_ends(1)
    pair = busiest(cluster)
    liar = cluster.placement.hosts_of[pair][1]
    path, offset = down_of(copies[liar], pair)
    begun_s = time.monotonic()
    with load.history.fault(FlippedBit(path, offset=offset + 2)):
        must(lambda: cluster.stats.wrong_answers[liar] > 0, f"{liar} is found out", timeout_s=MAX_DETECTION_S)
        print(f"FX21: a flipped bit was found after {time.monotonic() - begun_s:.2f} s")
        load.wait_for_tokens(WARM)
    load.end(label="FX21 flipped in the second copy")
    assert liar not in cluster.live, "it must not come back"
    assert cluster.stats.lost_hosts["ANSWER_WRONG"] == 1


def test_after_a_flipped_bit_of_a_first_copy_is_found_every_token_is_right(
    make: Make, cases: Cases, copies: dict[str, Path]
) -> None:
    cluster = make(model_dirs=copies, cross_check_every=CHECK_EVERY).start()
    load = cluster.load(cases.requests, cases.reference).start()
    load.wait_for_ends(1)
    pair = busiest(cluster)
    liar = cluster.placement.hosts_of[pair][0]
    path, offset = down_of(copies[liar], pair)
    with load.history.fault(FlippedBit(path, offset=offset + 2)):
        must(lambda: cluster.stats.wrong_answers[liar] > 0, f"{liar} is found out", timeout_s=MAX_DETECTION_S)
        found_s = time.monotonic()
        load.wait_for_tokens(2 * WARM)
        load.wait_for_tokens(2 * WARM)
    load.end(label="FX21 flipped in the first copy", since_s=found_s)
    assert liar not in cluster.live
    assert set(cluster.stats.wrong_answers) == {liar}, "a sound host was accused"


def test_a_damaged_copy_does_not_pass_the_comparison_before_it_serves(make: Make, copies: dict[str, Path]) -> None:
    cluster = make(model_dirs=copies)
    pair = next(pair for pair, hosts in cluster.placement.hosts_of.items() if hosts[0] == "expert-0")
    source, target = cluster.hosts["expert-0"], cluster.hosts[cluster.placement.hosts_of[pair][1]]
    moves = [Move(pair=pair, source=source.name, target=target.name)]
    wanted = to_prove(moves)
    path, offset = down_of(copies[target.name], pair)
    with FlippedBit(path, offset=offset + 2):
        prints = {host.name: host.fingerprints(wanted[host.name]) for host in (source, target)}
        with pytest.raises(EngineError, match="differs between") as caught:
            compare(moves, prints)
    assert caught.value.reason == "VERIFICATION_FAILED"
