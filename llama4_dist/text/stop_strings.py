"""Finds stop strings in text that arrives in pieces; knows no tokens."""

from collections.abc import Sequence


class StopStrings:
    """Reads characters one at a time and knows how many of the last ones may turn out to be a stop string.

    One Knuth-Morris-Pratt automaton per string: work per character does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = tuple(map(_borders, self._stops))
        self._matched = [0] * len(self._stops)

    @property
    def held(self) -> int:
        """Number of characters at the end that begin some stop string."""
        return max(self._matched, default=0)

    def read(self, character: str) -> str | None:
        """Take the next character; return the stop string it completes, the longest if several end here."""
        found: str | None = None
        for place, stop in enumerate(self._stops):
            matched, borders = self._matched[place], self._borders[place]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                found = stop if found is None or len(stop) > len(found) else found
                matched = borders[-1]
            self._matched[place] = matched
        return found


def _borders(stop: str) -> list[int]:
    """Return, per prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    for end in range(1, len(stop)):
        length = borders[end - 1]
        while length and stop[length] != stop[end]:
            length = borders[length - 1]
        borders[end] = length + (stop[length] == stop[end])
    return borders
