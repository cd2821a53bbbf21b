"""What a gateway, a real engine and a controller export is what is declared: what docs and queries name."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.observe.collector import ClusterCollector
from llama4_dist.client import Client
from llama4_dist.engine.build import build_single_process
from llama4_dist.engine.options import EngineOptions
from llama4_dist.gateway.settings import GatewaySettings
from llama4_dist.request import Sampling
from tests.checkpoints import make_checkpoint
from tests.cluster.small_clusters import SmallCluster, hasten
from tests.exported import differences
from tests.gateway.serving import Served, serving
from tests.scraping import scrape


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallCluster]:
    hasten(monkeypatch)
    cluster = SmallCluster(2, 1)
    yield cluster
    cluster.close()


@pytest.fixture
def served(tmp_path: Path, cluster: SmallCluster) -> Iterator[Served]:
    engine = build_single_process(
        make_checkpoint(tmp_path, "scout"), num_threads=1, options=EngineOptions(model_name="tiny", num_blocks=64)
    )
    collector = ClusterCollector(cluster.control.reading, cluster.control.head_answers, per_expert=True)
    with serving(engine, None, GatewaySettings(metrics_address="127.0.0.1:0"), collectors=[collector]) as served:
        yield served


def test_all_that_is_declared_is_exported_and_nothing_else(served: Served) -> None:
    with Client(served.address) as client:
        client.generate([1, 2, 3], Sampling(max_tokens=5, ignore_eos=True))
    found = scrape(served.gateway.metrics_port)
    assert not differences(found)
    assert found.value("generation_tokens_total", worker="local") == 5
    assert (found.value("gateway_process_resident_memory_bytes") or 0) > 1e6


def test_the_comparison_finds_what_is_missing_or_too_much(served: Served) -> None:
    found = scrape(served.gateway.metrics_port)
    del found.families["llama4_dist_engines"]
    found.families["llama4_dist_invented"] = found.families["llama4_dist_engine_steps"]
    assert differences(found) == [
        "llama4_dist_engines is declared only",
        "llama4_dist_invented_total is exported only",
    ]
