"""Hosts that are slow just now: whom to avoid while others hold the same experts. It is told the time."""

FIRST_S = 0.25  # how long a first miss counts against a host; doubled by each further one
LONGEST_S = 16.0
FORGIVEN_AFTER_S = 60.0  # without a miss, after which a host is as good as new


class Suspects:
    """Misses of one attention worker's hosts. A suspect is asked only where nobody else holds an expert."""

    def __init__(self) -> None:
        self._strikes: dict[str, int] = {}
        self._until_s: dict[str, float] = {}
        self.avoided: frozenset[str] = frozenset()

    def miss(self, host: str, now_s: float) -> None:
        """Note that a host let a deadline pass."""
        last_s = self._until_s.get(host)
        if last_s is not None and now_s - last_s > FORGIVEN_AFTER_S:
            self._strikes.pop(host, None)
        strikes = self._strikes[host] = self._strikes.get(host, 0) + 1
        self._until_s[host] = now_s + min(LONGEST_S, FIRST_S * 2.0 ** (strikes - 1))
        self.avoided |= {host}

    def expire(self, now_s: float) -> bool:
        """Give those another chance whose time is up; return whether there were any."""
        free = {host for host in self.avoided if now_s >= self._until_s[host]}
        self.avoided -= free
        return bool(free)

    def forget(self, host: str) -> None:
        """Forget a host that is gone."""
        self._strikes.pop(host, None)
        self._until_s.pop(host, None)
        self.avoided -= {host}
