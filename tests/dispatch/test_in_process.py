"""A host of the same thread is asked without frames; answers, counts and errors are those of frames."""

import pytest
import torch

from llama4_dist.dispatch.dispatcher import Dispatcher
from llama4_dist.dispatch.expert_server import ExpertServer
from llama4_dist.dispatch.links.inproc import InprocLink
from llama4_dist.dispatch.links.link import LinkLimits
from llama4_dist.dispatch.routing_table import RoutingTable
from llama4_dist.errors import EngineError, UnavailableError
from tests.dispatch.fakes import WIDTH, ScalingExperts, direct, held_by, identity, random_batch, random_table

TABLE = random_table(1)


class Site:
    """One host and one dispatcher, with frames or without."""

    def __init__(self, table: RoutingTable = TABLE, *, room: int = 0, with_frames: bool = False) -> None:
        self.experts = ScalingExperts(held_by(table, "host-0"), room=room)
        self.server = ExpertServer(
            identity=identity("host-0"),
            compute=self.experts,
            width=WIDTH,
            dtype=torch.float32,
            limits=LinkLimits(max_rows=256),
        )
        link = self.server.open_inproc(worker="worker-0", incarnation=0)
        assert isinstance(link, InprocLink)
        self.link = link
        if with_frames:
            link.answer = None
        self.dispatcher = Dispatcher(
            worker="worker-0", incarnation=0, table=table, links={"host-0": link}, width=WIDTH, dtype=torch.float32
        )

    def run(self, num_tokens: int, seed: int = 0, num_slots: int = 1) -> torch.Tensor:
        batch = random_batch(num_tokens, num_slots, seed=seed)
        return self.dispatcher.combine(self.dispatcher.dispatch(1, *batch))


def test_answers_and_counts_are_those_of_frames() -> None:
    sites = [Site(), Site(with_frames=True)]
    for num_tokens in (1, 7, 64, 1, 200):
        for num_slots in (1, 2):
            if num_tokens * num_slots > 256:
                continue
            batch = random_batch(num_tokens, num_slots, seed=num_tokens)
            for site in sites:
                assert torch.equal(site.run(num_tokens, num_tokens, num_slots), direct(1, *batch))
    without, with_frames = sites
    assert without.dispatcher.stats().frames_out["host-0"] == 9
    stats, expected = without.dispatcher.stats(), with_frames.dispatcher.stats()
    for name in ("rows_out", "frames_out", "bytes_out", "rows_in", "bytes_in"):
        assert getattr(stats, name) == getattr(expected, name)
    host, expected_host = without.server.stats(), with_frames.server.stats()
    for name in ("rows_by_expert", "rows_by_worker", "frames_in", "replies", "computations"):
        assert getattr(host, name) == getattr(expected_host, name)
    assert without.link.stats() == with_frames.link.stats()
    assert without.dispatcher.stats().wait_seconds == 0.0


def test_no_frame_is_made() -> None:
    site = Site()
    site.server.poll = None  # type: ignore[assignment,method-assign]
    site.run(5)
    assert site.dispatcher._exchange.last_number == 0


def test_rows_are_computed_when_they_are_wanted_and_each_microbatch_by_itself() -> None:
    site = Site()
    batches = [random_batch(9, 1, seed=seed) for seed in range(2)]
    flights = [site.dispatcher.dispatch(0, *batch, microbatch=index) for index, batch in enumerate(batches)]
    assert not site.experts.calls
    for flight, batch in zip(flights[::-1], batches[::-1], strict=True):
        assert torch.equal(site.dispatcher.combine(flight), direct(0, *batch))
    assert len(site.experts.calls) == 2


def test_a_second_worker_means_frames_and_pooling() -> None:
    site = Site()
    site.server.open_inproc(worker="worker-1", incarnation=0)
    site.run(5)
    assert site.dispatcher._exchange.last_number == 1


def test_what_the_host_lost_is_adopted_by_frames() -> None:
    site = Site(room=100)
    expected = site.run(8)
    site.experts.held.remove((1, int(random_batch(8, 1)[1][0])))
    assert torch.equal(site.run(8), expected)
    assert site.server.stats().adopted > 0
    assert torch.equal(site.run(8), expected)


def test_a_host_that_is_gone_is_an_error() -> None:
    site = Site()
    batch = random_batch(4, 1)
    flight = site.dispatcher.dispatch(0, *batch)
    site.link.other.abort()
    with pytest.raises(UnavailableError):
        site.dispatcher.combine(flight)


def test_rows_that_are_not_finite_are_our_own_error_and_answers_that_are_not_the_hosts() -> None:
    site = Site()
    x_TD, experts_TK, scores_TK = random_batch(4, 1)
    x_TD[2, 3] = float("nan")
    with pytest.raises(EngineError, match="not finite before"):
        site.dispatcher.combine(site.dispatcher.dispatch(0, x_TD, experts_TK, scores_TK))
    site = Site()
    x_TD[2, 3] = torch.finfo(torch.float32).max
    with pytest.raises(UnavailableError):
        site.dispatcher.combine(site.dispatcher.dispatch(0, x_TD, experts_TK, torch.ones_like(scores_TK)))


def test_a_computation_that_fails_is_refused_as_by_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site()

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ScalingExperts, "__call__", fail)
    with pytest.raises(UnavailableError):
        site.run(4)
    assert site.dispatcher.stats().refusals == {"COMPUTE_FAILED": 1}
