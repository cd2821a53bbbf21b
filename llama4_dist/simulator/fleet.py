"""Which expert hosts live and serve what, while they die, return, come and go; pure bookkeeping, times are given."""

from dataclasses import dataclass, field

from llama4_dist.planner.multinomial import Slowest, Spread, slowest_host, spread
from llama4_dist.planner.roofline import SliceCost

SAMPLES = 400
STEPS_PER_OCTAVE = 8  # rows at which draws are made; between them the times are interpolated


@dataclass(slots=True)
class Fleet:
    """The slices of one layer on hosts; all layers are alike. `copies_of[unit]` are hosts, the serving one first."""

    popularity: tuple[float, ...]
    num_slices: int
    num_replicas: int
    cost: SliceCost
    num_hosts: int
    most_slices: int  # of a layer on one host
    dead: set[int] = field(default_factory=set)
    copies_of: list[tuple[int, ...]] = field(default_factory=list)
    adopted: dict[int, int] = field(default_factory=dict)  # unit -> the host that took a lost one in

    def __post_init__(self) -> None:
        self.resize(self.num_hosts)

    def resize(self, num_hosts: int) -> int:
        """Place everything on so many hosts; return how many slices move to a host that had none of them."""
        before = list(self.copies_of)
        primary = spread(self.popularity, self.num_slices, num_hosts).hosts_of
        seen = [0] * num_hosts
        self.copies_of = []
        for host in primary:
            self.copies_of.append(_copies(host, seen[host], self.num_replicas, num_hosts))
            seen[host] += 1
        self.num_hosts = num_hosts
        self.dead = {host for host in self.dead if host < num_hosts}
        self.adopted.clear()
        if not before:
            return 0
        return sum(len(set(new) - set(old)) for new, old in zip(self.copies_of, before, strict=True))

    @property
    def num_alive(self) -> int:
        return self.num_hosts - len(self.dead)

    def held_by(self, host: int) -> int:
        """Return how many slices of a layer a host holds by plan."""
        return sum(host in hosts for hosts in self.copies_of)

    def kill(self, host: int) -> tuple[int, ...]:
        """Take a host away; return the slices that nobody holds any more."""
        self.dead.add(host)
        for unit in [unit for unit, on in self.adopted.items() if on == host]:
            del self.adopted[unit]
        return self.lost()

    def lost(self) -> tuple[int, ...]:
        """Return the slices without a living holder."""
        return tuple(unit for unit in range(len(self.copies_of)) if self._server(unit) is None)

    def adopt(self) -> tuple[int, ...]:
        """Let living hosts take in what is lost, the emptiest first; return what fits none."""
        for unit in self.lost():
            room = {
                host: self.most_slices - self._holds(host) for host in range(self.num_hosts) if host not in self.dead
            }
            if room and max(room.values()) > 0:
                self.adopted[unit] = max(room, key=lambda host: (room[host], -host))
        return self.lost()

    def _holds(self, host: int) -> int:
        return self.held_by(host) + sum(on == host for on in self.adopted.values())

    def revive(self, host: int) -> None:
        """Bring a host back with what it held; adopted slices it holds are its own again."""
        self.dead.discard(host)
        for unit in [unit for unit in self.adopted if host in self.copies_of[unit]]:
            del self.adopted[unit]

    def load(self, rows: int) -> Slowest:
        """Return what the hosts take for so many rows of all groups together, slices without a holder left out."""
        below = _grid(rows)
        if below == rows:
            return self._drawn(rows)
        above = _grid(rows, up=True)
        low, high, share = self._drawn(below), self._drawn(above), (rows - below) / (above - below)
        return Slowest(
            seconds=low.seconds + share * (high.seconds - low.seconds),
            rows=low.rows + share * (high.rows - low.rows),
            mean_seconds=low.mean_seconds + share * (high.mean_seconds - low.mean_seconds),
        )

    def _drawn(self, rows: int) -> Slowest:
        served = Spread(
            num_hosts=self.num_hosts,
            num_slices=self.num_slices,
            # A lost slice is asked of nobody: its rows wait. It counts for host 0 until somebody holds it.
            hosts_of=tuple(self._server(unit) or 0 for unit in range(len(self.copies_of))),
        )
        return slowest_host(
            rows, self.popularity, served, read_s=self.cost.read_s, row_s=self.cost.row_s, samples=SAMPLES
        )

    def _server(self, unit: int) -> int | None:
        living = (host for host in self.copies_of[unit] if host not in self.dead)
        return next(living, self.adopted.get(unit))


def _copies(host: int, place: int, num_replicas: int, num_hosts: int) -> tuple[int, ...]:
    """Return the hosts of the slice that is number `place` on its first host; further copies spread over all others.

    So what a dead host served is shared out evenly, as the cluster's own planner has it.
    """
    others = (1 + (place + copy) % (num_hosts - 1) for copy in range(num_replicas - 1))
    return (host, *((host + other) % num_hosts for other in others))


def _grid(rows: int, *, up: bool = False) -> int:
    """Return the nearest number of rows with three significant binary digits and one, below or above."""
    if rows <= 2 * STEPS_PER_OCTAVE:
        return rows
    step = 1 << (rows.bit_length() - 1 - (STEPS_PER_OCTAVE.bit_length() - 1))
    return (-(-rows // step) if up else rows // step) * step
