import pytest

from llama4_dist.planner import formats
from llama4_dist.planner.hardware import GB, HARDWARE
from llama4_dist.planner.layout import Layout
from llama4_dist.planner.memory import longest_context, memory_of
from llama4_dist.planner.multinomial import zipf
from llama4_dist.planner.search import search
from tests.planner.cases import geometry, request

H200 = HARDWARE["H200"]


@pytest.mark.parametrize(
    ("model", "attention_m", "expert_m", "total_b", "active_b", "routed_b", "trunk_b"),
    [
        ("scout", 62.9, 125.8, 107.8, 16.1, 96.6, 11.1),
        ("maverick", 62.9, 125.8, 400.7, 16.1, 386.5, 14.2),
        ("behemoth", 570.4, 1182.8, 1991.7, 285.2, 1816.8, 175.0),
    ],
)
def test_parameters_are_the_published_ones(
    model: str, attention_m: float, expert_m: float, total_b: float, active_b: float, routed_b: float, trunk_b: float
) -> None:
    found = geometry(model)
    assert found.attention_parameters / 1e6 == pytest.approx(attention_m, abs=0.06)
    assert found.expert_parameters / 1e6 == pytest.approx(expert_m, abs=0.06)
    for computed, printed in (
        (found.total_parameters, total_b),
        (found.active_parameters, active_b),
        (found.experts_parameters, routed_b),
        (found.trunk_parameters, trunk_b),
    ):
        assert computed / 1e9 == pytest.approx(printed, abs=0.06)


@pytest.mark.parametrize(
    ("model", "gigabytes", "kib"), [("scout", 6.04, 96), ("maverick", 3.02, 96), ("behemoth", 113.6, 192)]
)
def test_an_expert_and_a_token_take_the_published_bytes(model: str, gigabytes: float, kib: int) -> None:
    found = geometry(model)
    assert found.expert_parameters * found.num_moe_layers / GB == pytest.approx(gigabytes, rel=0.002)
    assert found.kv_bytes_per_sequence(4096, 1) == 4096 * kib * 1024


def test_chunked_layers_stop_growing_at_their_chunk() -> None:
    found = geometry("scout")
    at_chunk, far = found.kv_bytes_per_sequence(8192, 1), found.kv_bytes_per_sequence(4 * 8192, 1)
    assert far == at_chunk * (3 + 4) / 4  # a quarter of the layers has four times as many positions


@pytest.mark.parametrize(("hidden", "bf16", "fp8", "back"), [(16384, 32784, 16912, 32784), (5120, 10256, 5296, 10256)])
def test_rows_take_the_published_bytes_on_the_wire(hidden: int, bf16: int, fp8: int, back: int) -> None:
    assert formats.dispatch_bytes(hidden, "bf16") == bf16
    assert formats.dispatch_bytes(hidden, "fp8") == fp8
    assert formats.combine_bytes(hidden, "fp8") == back


@pytest.mark.parametrize(
    ("model", "dtype", "read_us", "b_nic", "b_nvlink", "rho_nic", "rho_nvlink"),
    [
        ("behemoth", "fp8", 246, 376, 3384, 1.82, 16.4),
        ("behemoth", "bf16", 493, 752, 6768, 3.65, 32.8),
        ("scout", "fp8", 26.2, 128, 1152, 0.62, 5.6),
        ("scout", "bf16", 52.4, 256, 2304, 1.24, 11.2),
    ],
)
def test_where_links_become_the_limit_is_as_published(
    model: str, dtype: str, read_us: float, b_nic: float, b_nvlink: float, rho_nic: float, rho_nvlink: float
) -> None:
    found, width = geometry(model), geometry(model).config.expert_width
    size, flops = formats.weight_bytes(dtype), H200.flops[dtype]
    assert 1e6 * found.expert_parameters * size / H200.memory_bandwidth == pytest.approx(read_us, rel=0.005)
    assert size * flops / (2 * H200.memory_bandwidth) == pytest.approx(206, abs=0.5)  # the ridge, of both formats
    for link, rows, rho in ((H200.nic_bandwidth, b_nic, rho_nic), (H200.nvlink_bandwidth, b_nvlink, rho_nvlink)):
        # Rows of an expert at which sending results takes as long as reading weights, and arithmetic over transfer.
        assert 1.5 * width * size * link / H200.memory_bandwidth == pytest.approx(rows, rel=0.005)
        assert 3 * width * link / flops == pytest.approx(rho, rel=0.01)


@pytest.mark.parametrize(
    ("model", "layout", "context", "attention_gb", "expert_gb", "fits"),
    [
        ("behemoth", Layout(ranks=8, hosts=16, sequences=512), 8192, 125, 113.6, True),
        ("behemoth", Layout(ranks=8, hosts=16, sequences=128), 131072, 144, 113.6, False),
        ("scout", Layout(hosts=4, sequences=128), 8192, 114, 24.2, True),
        ("maverick", Layout(hosts=4, sequences=128), 8192, 117, 96.6, True),
        ("scout", Layout(hosts=4, sequences=256), 8192, 206 + 11.1, 24.2, False),
    ],
)
def test_memory_is_as_published(
    model: str, layout: Layout, context: int, attention_gb: float, expert_gb: float, fits: bool
) -> None:
    found = memory_of(geometry(model), layout, context, H200.memory_bytes)
    assert found.attention / GB == pytest.approx(attention_gb, rel=0.01)
    assert found.expert_weights / GB == pytest.approx(expert_gb, rel=0.01)
    assert (found.attention_fits and found.experts_fit) is fits


def test_the_longest_context_is_the_last_that_fits() -> None:
    model, layout = geometry("scout"), Layout(hosts=4, sequences=128)
    found = memory_of(model, layout, 8192, H200.memory_bytes)
    longest = longest_context(model, layout, found)
    assert memory_of(model, layout, longest, H200.memory_bytes).attention_fits
    assert not memory_of(model, layout, longest + 16, H200.memory_bytes).attention_fits


def test_ranks_beyond_the_kv_heads_save_no_cache() -> None:
    eight = memory_of(geometry("behemoth"), Layout(ranks=8, hosts=16, sequences=8), 8192, H200.memory_bytes)
    sixteen = memory_of(geometry("behemoth"), Layout(ranks=16, hosts=16, sequences=8), 8192, H200.memory_bytes)
    assert sixteen.kv == eight.kv
    assert sixteen.attention_weights == eight.attention_weights / 2


def test_zipf_is_a_distribution_and_zero_is_uniform() -> None:
    assert zipf(16, 0.0) == (1 / 16,) * 16
    assert sum(zipf(16, 1.2)) == pytest.approx(1.0)


def test_a_plan_for_the_published_fleet_is_at_least_as_good_as_the_table() -> None:
    """The table's best for 96 H200 in 60 ms is 809 tok/s/GPU x 96 with two GPUs per expert; slices send rows twice."""
    best = search(request(slo_tpot_s=0.06)).plans[0]
    assert best.layout.slices == 2
    assert best.layout.hosts == 32
    assert best.step.step_s <= 0.06
    assert best.tokens_per_s > 0.8 * 809 * 96
