"""Chooses among engines by what they have computed before and by load; knows tokens and names, calls no engine.

The engine that was given the longest start of the prompt lately is asked first, as by SGLang's cache-aware router
(Zheng et al. 2024, arXiv:2312.07104), but none may have more than LOAD_FACTOR times its share of the requests:
"Consistent Hashing with Bounded Loads" (Mirrokni et al. 2018). The table is a guess, bounded, and never wrong to lose:
which pages an engine still has, only the engine knows.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock

from llama4_dist.engine.prefix import PrefixChain
from llama4_dist.request import EngineRequest

LOAD_FACTOR = 1.25
BLOCK_SIZE = 64  # tokens per entry: shorter starts save less than a detour costs
MAX_BLOCKS = 256  # of one prompt: what is equal for 16,384 tokens is taken for equal
MAX_ENTRIES = 1 << 16
MAX_NAMES = 4  # engines remembered per entry, the latest first


def preferred(matches: Sequence[Sequence[str]], loads: Mapping[str, int], *, factor: float = LOAD_FACTOR) -> list[str]:
    """Order engines for one request. `matches` are those that had a start of it, the longest start first.

    First come those with a match and a load below `factor` times the mean, the request included; then all others, the
    least loaded first.
    """
    if not loads:
        return []
    bound = math.ceil(factor * (sum(loads.values()) + 1) / len(loads))
    first = [name for names in matches for name in names if name in loads and loads[name] < bound]
    return list(dict.fromkeys([*first, *sorted(loads, key=lambda name: loads[name])]))


class PrefixRouter:
    """Remembers who was given which starts of prompts; thread-safe."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._names: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()  # least recently used first
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._names)

    def order(self, request: EngineRequest, loads: Mapping[str, int]) -> list[str]:
        """Return the names of `loads` in the order in which they should be asked."""
        keys = _keys(request)
        with self._lock:
            found = [self._names[key] for key in keys if key in self._names]
        return preferred(found[::-1], loads)

    def note(self, request: EngineRequest, name: str) -> None:
        """Remember that an engine took a request."""
        keys = _keys(request)
        with self._lock:
            for key in reversed(keys):  # the end of a prompt is forgotten before its start
                others = (other for other in self._names.pop(key, ()) if other != name)
                self._names[key] = (name, *others)[:MAX_NAMES]
            while len(self._names) > self._max_entries:
                self._names.popitem(last=False)

    def forget(self, name: str) -> None:
        """Forget an engine that is gone: another of its name begins without any prefix."""
        with self._lock:
            for key, names in self._names.items():
                if name in names:
                    self._names[key] = tuple(other for other in names if other != name)


def _keys(request: EngineRequest) -> list[bytes]:
    tokens = request.prompt_token_ids
    chain = PrefixChain(tokens, root=request.tenant.encode(), block_size=BLOCK_SIZE)
    return [chain.key(block) for block in range(min(len(tokens) // BLOCK_SIZE, MAX_BLOCKS))]
