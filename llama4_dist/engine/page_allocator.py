"""Hands out KV pages and takes them back; counts holders of a page, knows neither tensors nor what a page holds."""

from collections import Counter
from collections.abc import Iterable


class PageAllocator:
    """A free list and a count of holders per page. All calls are O(pages moved) and deterministic."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"{num_pages=} must be at least 1")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is warm in cache
        self._num_holders: Counter[int] = Counter()

    @property
    def num_free(self) -> int:
        """Return how many pages nobody holds."""
        return len(self._free)

    def num_holders(self, page: int) -> int:
        return self._num_holders[page]

    def take(self, count: int) -> tuple[int, ...]:
        """Give `count` pages to one holder; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} pages are wanted, {self.num_free} are free"
        pages = tuple(self._free.pop() for _ in range(count))
        self._num_holders.update(pages)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Take pages back from one holder."""
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is given back and nobody holds it"
            self._num_holders[page] -= 1
            if not self._num_holders[page]:
                del self._num_holders[page]
                self._free.append(page)

    def check(self, held: Iterable[int]) -> None:
        """Assert conservation against all pages that all holders say they hold."""
        assert Counter(held) == self._num_holders, "holders and allocator disagree on who holds which page"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert not self._num_holders.keys() & set(self._free), "a page is free and held"
        assert len(self._free) + len(self._num_holders) == self.num_pages, "pages were lost"
