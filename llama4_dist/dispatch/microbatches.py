"""Whether a step's batch pays in two halves that take turns: a formula, and what steps took. Knows no links.

Whole, a layer takes attention + max(shared expert, reply). In m parts, attention and shared expert of one part run
while the experts of another compute: max(m x (attention + shared), m x expert, attention + shared + reply), with the
times of a part. Parts read weights again, so these are times measured for a batch of that size, not a fraction.
"""

import statistics
from collections import deque
from dataclasses import dataclass, fields

MAX_MICROBATCHES = 2  # more never pays in any geometry computed: weights are read once more each
ENOUGH = 8  # steps of a size before what they took is believed
TRY_AGAIN = 1000  # steps of a size after which the other choice is tried again
MARGIN = 0.05  # what a change must save, so that noise does not flip the choice


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds that one MoE layer takes for a batch of one size.

    `reply_s` is from posting rows to having the replies: both ways and the expert; `expert_s` is the expert's share of
    it, or the whole where that is not known.
    """

    attention_s: float
    shared_s: float
    reply_s: float
    expert_s: float

    def __post_init__(self) -> None:
        if min(self.attention_s, self.shared_s, self.reply_s, self.expert_s) < 0 or self.expert_s > self.reply_s:
            raise ValueError(f"times must not be negative, and an expert is a part of the reply: {self}")


def layer_s(times: LayerTimes, num_microbatches: int) -> float:
    """Return how long a layer takes in so many parts; `times` are those of a part."""
    own_s = times.attention_s + times.shared_s
    if num_microbatches == 1:
        return times.attention_s + max(times.shared_s, times.reply_s)
    return max(num_microbatches * own_s, num_microbatches * times.expert_s, own_s + times.reply_s)


def num_microbatches(whole: LayerTimes, half: LayerTimes, *, current: int, margin: float = MARGIN) -> int:
    """Return 1 or 2: what takes less time; the other than `current` only where it saves more than `margin`."""
    one_s, two_s = layer_s(whole, 1), layer_s(half, MAX_MICROBATCHES)
    if current == 1:
        return 2 if two_s < (1.0 - margin) * one_s else 1
    return 1 if one_s < (1.0 - margin) * two_s else 2


def could_save(whole: LayerTimes) -> bool:
    """Tell whether two parts would save something if everything took half as long for half the rows."""
    half = LayerTimes(
        attention_s=whole.attention_s / 2, shared_s=whole.shared_s / 2, reply_s=whole.reply_s / 2, expert_s=0.0
    )
    return num_microbatches(whole, half, current=1) == 2


class MicrobatchChoice:
    """Chooses for each size of batch (powers of two of rows) by what steps took.

    Two parts are tried for some steps where the formula says that they could save something, and kept where they did.
    What half a batch takes, and what a reply's expert takes of it, nobody knows before: so it is tried, not guessed.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def choose(self, num_rows: int) -> int:
        """Return in how many parts a batch of so many rows is to run; 1 while too little is known."""
        size = self._sizes.get(num_rows.bit_length())
        return 1 if size is None or num_rows < MAX_MICROBATCHES else size.choose()

    def observe(self, num_rows: int, num_parts: int, seconds: float, times: LayerTimes) -> None:
        """Note what a step took in so many parts; `times` are its layers' together."""
        size = self._sizes.setdefault(num_rows.bit_length(), _Size())
        size.observe(num_parts, seconds, times)


class _Size:
    """Batches of about one size: the last steps in one part and in two."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {parts: deque(maxlen=ENOUGH) for parts in (1, MAX_MICROBATCHES)}
        self._times: deque[LayerTimes] = deque(maxlen=ENOUGH)  # of steps in one part
        self._current = 1
        self._age = 0  # steps since both were compared

    def choose(self) -> int:
        one, two = self._seconds[1], self._seconds[MAX_MICROBATCHES]
        if len(one) < ENOUGH:
            return 1
        if len(two) < ENOUGH:
            return MAX_MICROBATCHES if could_save(self._typical()) else 1
        one_s, two_s = statistics.median(one), statistics.median(two)
        if self._current == 1 and two_s < (1.0 - MARGIN) * one_s:
            self._current = MAX_MICROBATCHES
        elif self._current > 1 and one_s < (1.0 - MARGIN) * two_s:
            self._current = 1
        return self._current

    def observe(self, num_parts: int, seconds: float, times: LayerTimes) -> None:
        self._seconds[num_parts].append(seconds)
        if num_parts == 1:
            self._times.append(times)
        self._age += 1
        if self._age >= TRY_AGAIN:  # hosts come and go: compare anew
            self._age = 0
            self._seconds[1 if self._current > 1 else MAX_MICROBATCHES].clear()

    def _typical(self) -> LayerTimes:
        """Return the median of each time, so that one slow step does not count."""
        return LayerTimes(
            **{
                field.name: statistics.median(getattr(times, field.name) for times in self._times)
                for field in fields(LayerTimes)
            }
        )
