"""Whether a step's batch pays in two halves that take turns: pure arithmetic on measured times. Knows no links.

Whole, a layer takes attention + max(shared expert, reply). In m parts, attention and shared expert of one part run
while the experts of another compute: max(m x (attention + shared), m x expert, attention + shared + reply), with the
times of a part. Parts read weights again, so these are times measured for a batch of that size, not a fraction.
"""

import statistics
from collections import deque
from dataclasses import dataclass

MAX_MICROBATCHES = 2  # more never pays in any geometry computed: weights are read once more each
WINDOW = 32  # layers remembered per size
ENOUGH = 8  # layers of a size before its times are believed
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


class MicrobatchChoice:
    """Keeps the times of batches by size (powers of two of rows) and the choice that holds."""

    def __init__(self, *, margin: float = MARGIN) -> None:
        self._margin = margin
        self._times: dict[int, deque[LayerTimes]] = {}
        self._current: dict[int, int] = {}

    def observe(self, num_rows: int, times: LayerTimes) -> None:
        """Note what a layer of a batch, or of a part of one, took."""
        self._times.setdefault(num_rows.bit_length(), deque(maxlen=WINDOW)).append(times)

    def choose(self, num_rows: int) -> int:
        """Return in how many parts a batch of so many rows is to run; 1 while too little is known.

        Where nothing is known of half the size, its times are taken to be those of the whole: no less than they are,
        so a choice for two parts is never made on hope.
        """
        size = num_rows.bit_length()
        whole = self._typical(size)
        if whole is None or num_rows < MAX_MICROBATCHES:
            return 1
        half = self._typical(size - 1) or whole
        chosen = num_microbatches(whole, half, current=self._current.get(size, 1), margin=self._margin)
        self._current[size] = chosen
        return chosen

    def _typical(self, size: int) -> LayerTimes | None:
        """Return the median of each time, so that one slow layer does not count."""
        known = self._times.get(size)
        if known is None or len(known) < ENOUGH:
            return None
        reply_s = statistics.median(times.reply_s for times in known)
        return LayerTimes(
            attention_s=statistics.median(times.attention_s for times in known),
            shared_s=statistics.median(times.shared_s for times in known),
            reply_s=reply_s,
            expert_s=min(reply_s, statistics.median(times.expert_s for times in known)),
        )
