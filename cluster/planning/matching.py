"""Puts units of rows on columns within limits, moving others on where it must: a flow of shortest augmenting paths.

It serves twice: copies of layers on hosts (how many), and copies of a layer's experts on hosts (which). Columns lie in
groups, the nodes; a row may have a limit on each. It knows nothing of bytes, loads or what a unit is.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

Vertex = tuple[str, int, int]  # ("row", row, 0), ("group", row, group) or ("column", column, 0)
Matrix = list[list[int]]
Cells = Callable[[int, int], bool]  # says of a (row, column) whether it is meant


def _every(row: int, column: int) -> bool:
    return True


class Matching:
    """`count[row][column]` units lie there, between `least` and `most`; `need` and `room` are what is still open."""

    def __init__(
        self,
        *,
        need: Sequence[int],
        room: Sequence[int],
        group_of: Sequence[int],
        least: Matrix,
        most: Matrix,
        group_most: Matrix,
    ) -> None:
        self.count = [[0] * len(room) for _ in need]
        self.need, self.room = list(need), list(room)
        self.least, self.most, self.group_most = least, most, group_most
        self._group_of = group_of
        self._columns_of = [
            [column for column, of in enumerate(group_of) if of == group] for group in range(max(group_of) + 1)
        ]
        self._group_count = [[0] * len(self._columns_of) for _ in need]
        for row, counts in enumerate(least):
            for column, count in enumerate(counts):
                self.put(row, column, count)

    def put(self, row: int, column: int, count: int = 1) -> None:
        """Lay units there; a negative count takes them away."""
        self.count[row][column] += count
        self._group_count[row][self._group_of[column]] += count
        self.need[row] -= count
        self.room[column] -= count

    def fits(self, row: int, column: int) -> bool:
        """Say whether one more unit may lie there, whatever the column's room."""
        group = self._group_of[column]
        return (
            self.count[row][column] < self.most[row][column]
            and self._group_count[row][group] < self.group_most[row][group]
        )

    def open_columns(self, row: int) -> list[int]:
        """Columns that can take one more unit of the row as they are."""
        return [column for column, room in enumerate(self.room) if room > 0 and self.fits(row, column)]

    def augment(self, *, only: Cells = _every, cheap: Cells = _every) -> None:
        """Meet what need can be met, moving units of other rows on: `only` to these cells, to `cheap` ones rather."""
        # What a failed search saw leads to no room, now or after other paths were taken (Hungarian trees).
        dead: set[Vertex] = set()
        for row in range(len(self.need)):
            while self.need[row] > 0 and self._augment(("row", row, 0), only, cheap, dead):
                pass

    def _augment(self, start: Vertex, only: Cells, cheap: Cells, dead: set[Vertex]) -> bool:
        """Find the path that lays the fewest units on dear cells (a search by steps of cost 0 and 1) and take it."""
        costs, parents = {start: 0}, {start: start}
        queue, seen = deque([start]), set(dead)
        while queue:
            vertex = queue.popleft()
            if vertex in seen:
                continue
            seen.add(vertex)
            if vertex[0] == "column" and self.room[vertex[1]] > 0:
                self._shift(vertex, parents)
                return True
            for following in self._residual(vertex, only):
                step = int(following[0] == "column" and not cheap(vertex[1], following[1]))
                cost = costs[vertex] + step
                if following not in seen and cost < costs.get(following, cost + 1):
                    costs[following], parents[following] = cost, vertex
                    (queue.append if step else queue.appendleft)(following)
        dead |= seen
        return False

    def _residual(self, vertex: Vertex, only: Cells) -> Iterator[Vertex]:
        """The steps from a vertex: lay a unit down (towards a column), or take one up (away from a column)."""
        kind, index, group = vertex
        if kind == "row":
            for at, count in enumerate(self._group_count[index]):
                if count < self.group_most[index][at]:
                    yield "group", index, at
        elif kind == "group":
            counts, most = self.count[index], self.most[index]
            for column in self._columns_of[group]:
                if counts[column] < most[column] and only(index, column):
                    yield "column", column, 0
            if self._group_count[index][group]:
                yield "row", index, 0
        else:
            for row, counts in enumerate(self.count):
                if counts[index] > self.least[row][index]:
                    yield "group", row, self._group_of[index]

    def _shift(self, end: Vertex, parents: dict[Vertex, Vertex]) -> None:
        """Carry one unit along the path that ends there."""
        while parents[end] != end:
            start = parents[end]
            if end[0] == "column":
                self.put(start[1], end[1])
            elif start[0] == "column":
                self.put(end[1], start[1], -1)
            end = start
