"""Faults of packets on a relay, proven by numbered datagrams; knows how often each must show, not how it is made."""

import math

from tests.faults.fault import Fault, FaultNotVerified
from tests.faults.namespaces import Node
from tests.faults.probe import Passage, probe
from tests.faults.relay import CALM, RelayNetwork, Weather

MIN_PROBES = 100
MIN_SHARE = 0.001
EXPECTED_HITS = 10  # probes are so many that each share shows this often; a quarter of it proves the fault
GAP_S = 0.001


class BadWeather(Fault):
    """Weather from one node to another. `aim` is (source, destination). A share of 0.001 takes 10 s to prove."""

    def __init__(
        self,
        network: RelayNetwork,
        source: Node,
        destination: Node,
        weather: Weather,
        *,
        aim: tuple[Node, Node] | None = None,
    ) -> None:
        shares = [share for share in (weather.loss, weather.duplicate, weather.reorder) if share]
        if shares and min(shares) < MIN_SHARE:
            raise ValueError(f"a share of {min(shares)} is too rare to be verified: {MIN_SHARE} can be")
        self._count = max([MIN_PROBES, *(math.ceil(EXPECTED_HITS / share) for share in shares)])
        self._network, self._source, self._destination, self.weather = network, source, destination, weather
        self._aim = aim or (source, destination)
        self.measured: Passage | None = None

    def inject(self) -> None:
        self._network.set(*self._aim, self.weather)

    def verify(self) -> None:
        """Compare what numbered datagrams went through with what was asked for."""
        seen = self.measured = self._probe()
        wanted, arrived = self.weather, (1 - self.weather.loss) * self._count / 4
        missing = {
            "delay": arrived and seen.median_delay_s < wanted.delay_s,
            "loss": seen.loss < wanted.loss / 4,
            "duplicates": seen.num_duplicates < wanted.duplicate * arrived,
            "reordering": seen.num_late < wanted.reorder * arrived,
        }
        if names := [name for name, is_missing in missing.items() if is_missing]:
            raise FaultNotVerified(f"{', '.join(names)} does not show from {self._way()}: {self._shown(seen)}")

    def heal(self) -> None:
        self._network.set(*self._aim, CALM)

    def verify_healed(self) -> None:
        seen = self._probe()
        if (
            seen.loss
            or seen.num_duplicates
            or seen.num_late
            or seen.median_delay_s > max(0.05, self.weather.delay_s / 2)
        ):
            raise FaultNotVerified(f"from {self._way()} the weather is not calm: {self._shown(seen)}")

    def _probe(self) -> Passage:
        patience_s = self.weather.delay_s + self.weather.jitter_s
        return probe(self._source, self._destination, count=self._count, gap_s=GAP_S, patience_s=patience_s)

    def _way(self) -> str:
        return f"{self._source.address} to {self._destination.address}"

    @staticmethod
    def _shown(seen: Passage) -> str:
        return (
            f"of {seen.num_sent} packets {seen.loss:.1%} lost, {seen.num_duplicates} doubled, {seen.num_late} late,"
            f" median delay {seen.median_delay_s * 1e3:.1f} ms"
        )
