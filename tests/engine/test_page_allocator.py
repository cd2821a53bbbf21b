"""Pages under any order of taking, naming, sharing and giving back, against a model that keeps plain lists."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama4_dist.engine.page_allocator import PageAllocator


class PageMachine(RuleBasedStateMachine):
    """Seven pages: `held` by holder, `names` of those that have one, `idle` named ones in order of their release."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(7)
        self.held: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        self.idle: list[int] = []
        self.unnamed: set[int] = set()  # had a name, and may not get another while they are held
        self.num_named = 0
        self.num_evicted = 0

    def holders(self, page: int) -> int:
        return sum(page in pages for pages in self.held)

    def num_unnamed_free(self) -> int:
        return 7 - len({page for pages in self.held for page in pages}) - len(self.idle)

    @rule(count=st.integers(0, 4))
    def take(self, count: int) -> None:
        count = min(count, self.allocator.num_free)
        num_evicted = max(0, count - self.num_unnamed_free())
        evicted, self.idle = self.idle[:num_evicted], self.idle[num_evicted:]  # the one released first goes first
        for page in evicted:
            del self.names[page]
        self.num_evicted += len(evicted)
        taken = self.allocator.take(count)
        assert len(set(taken)) == count
        assert not {page for pages in self.held for page in pages} & set(taken), "a page has two owners"
        assert not set(taken) & self.names.keys(), "a page is taken while its contents can be found"
        self.held.append(list(taken))

    @rule(count=st.integers(1, 3))
    def come_and_go(self, count: int) -> None:
        """What a sequence does whose blocks are all full: it leaves named pages that nobody holds."""
        self.take(count)
        pages = self.held[-1]
        for page in pages:
            self.num_named += 1
            self.names[page] = b"%d" % self.num_named
            self.allocator.name(page, (0, self.names[page]))
        self.allocator.release(self.held.pop())
        self.idle += pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.allocator.release(pages)
        self.unnamed -= {page for page in pages if not self.holders(page)}
        self.idle += [page for page in pages if page in self.names and not self.holders(page)]

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([page for pages in self.held for page in pages]))
        if page not in self.names.keys() | self.unnamed:
            self.num_named += 1
            self.names[page] = b"%d" % self.num_named
            self.allocator.name(page, (0, self.names[page]))

    @precondition(lambda self: any(self.held) and self.names)
    @rule(data=st.data())
    def name_what_another_page_holds(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([page for pages in self.held for page in pages]))
        if page not in self.names.keys() | self.unnamed:
            self.allocator.name(page, (0, data.draw(st.sampled_from(sorted(self.names.values())))))

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names.values())))
        page = self.allocator.page_of((0, name))
        assert page is not None
        assert self.names[page] == name
        self.allocator.hold([page])
        self.held.append([page])
        if page in self.idle:
            self.idle.remove(page)

    @rule()
    def forget(self) -> None:
        self.allocator.forget_names()
        self.unnamed |= self.names.keys() - set(self.idle)
        self.names.clear()
        self.idle.clear()

    @invariant()
    def all_pages_are_accounted_for(self) -> None:
        self.allocator.check(page for pages in self.held for page in pages)
        assert self.allocator.num_idle == len(self.idle)
        assert self.allocator.num_free == self.num_unnamed_free() + len(self.idle)
        assert self.allocator.num_evictions == self.num_evicted
        assert {page: self.allocator.key_of(page) for page in range(7)} == {
            page: (0, self.names[page]) if page in self.names else None for page in range(7)
        }


PageMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestPages = PageMachine.TestCase
