"""Who is next within a priority: the tenant that was served least. Counts tokens, knows no sequence and no clock.

The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024): each computed token
is charged to its tenant, and a tenant that comes back after a pause starts at the least of those that are active, so
idle time is no credit. Whoever waits has its turn once the others have been served as much: nobody starves.
"""

from collections import Counter


class FairShare:
    """Tokens served per tenant that has requests, or that was served more than those which have."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._num_live: Counter[str] = Counter()

    def served(self, tenant: str) -> int:
        return self._served.get(tenant, 0)

    def enter(self, tenant: str) -> None:
        """Count a request of a tenant."""
        if not self._num_live[tenant]:
            self._served[tenant] = max(self.served(tenant), self._least())
        self._num_live[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Count a request's end; a tenant whose counter means nothing any more is forgotten."""
        self._num_live[tenant] -= 1
        if not self._num_live[tenant]:
            del self._num_live[tenant]
            least = self._least()
            self._served = {
                name: count
                for name, count in self._served.items()
                if name in self._num_live or (self._num_live and count > least)
            }

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Count tokens that were computed for a tenant."""
        self._served[tenant] = self.served(tenant) + num_tokens

    def _least(self) -> int:
        return min((self._served[name] for name in self._num_live if self._num_live[name]), default=0)
