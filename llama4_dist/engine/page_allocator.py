"""Hands out KV pages and takes them back; counts a page's holders, keeps named pages for whoever asks."""

from collections import Counter, OrderedDict
from collections.abc import Iterable

from llama4_dist.engine.prefix import Key


class PageAllocator:
    """Every page is free, held by one or more, or idle: nobody holds it, but its contents have a name.

    Idle pages are taken, the least recently held first, once no free page is left. All calls are O(pages moved) and
    deterministic.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"{num_pages=} must be at least 1")
        self.num_pages = num_pages
        self.num_evictions = 0
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is warm in cache
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._num_holders: Counter[int] = Counter()
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._had_name: set[int] = set()  # held pages that nobody finds any more; they may be shared still

    @property
    def num_free(self) -> int:
        """Return how many pages nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Return how many pages nobody holds, but that are kept for their contents."""
        return len(self._idle)

    def num_holders(self, page: int) -> int:
        return self._num_holders[page]

    def page_of(self, key: Key) -> int | None:
        """Return the page with these contents, if there is one."""
        return self._page_of.get(key)

    def key_of(self, page: int) -> Key | None:
        """Return the name of a page's contents."""
        return self._key_of.get(page)

    def take(self, count: int) -> tuple[int, ...]:
        """Give `count` pages to one holder; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} pages are wanted, {self.num_free} are free"
        pages = tuple(self._free.pop() if self._free else self._evict() for _ in range(count))
        self._num_holders.update(pages)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Add a holder to pages that have names."""
        for page in pages:
            assert page in self._key_of, f"page {page} has no name: it may still be written to"
            self._idle.pop(page, None)
            self._num_holders[page] += 1

    def name(self, page: int, key: Key) -> None:
        """Say what a held page contains from now on; of two pages with the same contents the first keeps the name."""
        assert self._num_holders[page] == 1, f"page {page} has {self._num_holders[page]} holders before it has a name"
        assert page not in self._had_name, f"page {page} lost its name"
        if key not in self._page_of:
            assert page not in self._key_of, f"page {page} has another name"
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Iterable[int]) -> None:
        """Take pages back from one holder; of those with names the first is the first to be evicted."""
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is given back and nobody holds it"
            self._num_holders[page] -= 1
            if not self._num_holders[page]:
                del self._num_holders[page]
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
                    self._had_name.discard(page)

    def forget_names(self) -> None:
        """Let nothing computed so far be found any more; who holds a page keeps it."""
        self._had_name |= self._key_of.keys() - self._idle.keys()
        self._page_of.clear()
        self._key_of.clear()
        self._free += self._idle
        self._idle.clear()

    def check(self, held: Iterable[int]) -> None:
        """Assert conservation against all pages that all holders say they hold."""
        assert Counter(held) == self._num_holders, "holders and allocator disagree on who holds which page"
        free, idle, holders = set(self._free), self._idle.keys(), self._num_holders.keys()
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(idle) + len(holders) == self.num_pages, "pages were lost"
        assert free | idle | holders == set(range(self.num_pages)), "a page is two of free, idle and held"
        assert self._key_of == {page: key for key, page in self._page_of.items()}, "names and pages disagree"
        assert idle <= self._key_of.keys(), "a page without a name is kept"
        assert not free & self._key_of.keys(), "a free page has a name"
        shared = {page for page, count in self._num_holders.items() if count > 1}
        assert shared <= self._key_of.keys() | self._had_name, "a page that may be written to has two holders"

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        self.num_evictions += 1
        return page
