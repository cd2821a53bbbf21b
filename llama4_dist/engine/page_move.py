"""Says which pages a sequence gives back and how many it needs for its next positions; pure, takes nothing itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from llama4_dist.model.batch import PageRun

Pages = tuple[PageRun, ...]  # a run for each group of the layout, or () for a holder of nothing
NOTHING = PageRun(first_block=0, ids=())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageMove:
    """From `pages` to runs over the `blocks` of each group: leading pages go, trailing ones come."""

    pages: Pages
    blocks: tuple[range, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        """The pages to give back."""
        return tuple(chain.from_iterable(run.ids[: self._lead(run, blocks)] for run, blocks in self._pairs()))

    @property
    def num_taken(self) -> int:
        """How many pages to take."""
        return sum(self._missing(run, blocks) for run, blocks in self._pairs())

    def apply(self, taken: Sequence[int]) -> Pages:
        """Return the runs after `num_taken` pages came; a run that stays as it is stays the same object."""
        ids = iter(taken)
        moved = tuple(self._moved(run, blocks, ids) for run, blocks in self._pairs())
        assert next(ids, None) is None, "a page was taken for no block"
        return moved

    def _pairs(self) -> Iterator[tuple[PageRun, range]]:
        return zip(self.pages or (NOTHING,) * len(self.blocks), self.blocks, strict=True)

    @staticmethod
    def _lead(run: PageRun, blocks: range) -> int:
        return min(max(0, blocks.start - run.first_block), len(run.ids))

    @staticmethod
    def _missing(run: PageRun, blocks: range) -> int:
        held_until = run.stop_block if run.ids else 0
        return max(0, blocks.stop - max(blocks.start, held_until))

    def _moved(self, run: PageRun, blocks: range, taken: Iterator[int]) -> PageRun:
        lead, missing = self._lead(run, blocks), self._missing(run, blocks)
        if not (lead or missing):
            return run
        kept = run.ids[lead:]
        return PageRun(
            first_block=run.first_block + lead if kept else blocks.start,
            ids=(*kept, *(next(taken) for _ in range(missing))),
        )


def page_ids(pages: Pages) -> Iterator[int]:
    """Return all pages of all groups."""
    return chain.from_iterable(run.ids for run in pages)


def num_covered(pages: Pages, block_size: int) -> int:
    """Return up to which position all groups have pages."""
    return min((run.stop_block for run in pages), default=0) * block_size
