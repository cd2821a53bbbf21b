"""A step in parts that take turns: while the experts compute for one part, attention runs for the other.

Source: MegaScale-Infer (Zhu et al. 2025), "ping-pong pipeline parallelism". A token's bits are the same in any part,
because they are the same in any batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from llama4_dist.model.batch import SequenceSpan

P = TypeVar("P", contravariant=True)


class Layer(Protocol[P]):
    """What a decoder layer does for a part of a step, in two halves."""

    def begin(self, part: P) -> None:
        """Run attention, and send rows to experts elsewhere."""

    def finish(self, part: P) -> None:
        """Take in what `begin` has left on its way."""


def run_layers(layers: Sequence[Layer[P]], parts: Sequence[P]) -> None:
    """Take all parts through all layers; a part waits for its experts only when the others have been served."""
    before: Layer[P] | None = None
    for layer in layers:
        for part in parts:
            if before is not None:
                before.finish(part)
            layer.begin(part)
        before = layer
    if before is not None:
        for part in parts:
            before.finish(part)


def split_spans(spans: Sequence[SequenceSpan], num_parts: int) -> list[tuple[SequenceSpan, ...]]:
    """Cut a step's tokens into parts whose numbers differ by one at most; no part is empty, so there may be fewer.

    A span on the border is cut in two: its second half sees the keys of the first, which writes them before in each
    layer, and has a page run that covers both.
    """
    num_tokens = sum(span.num_tokens for span in spans)
    num_parts = min(num_parts, num_tokens)
    if num_parts <= 1:
        return [tuple(spans)]
    parts: list[tuple[SequenceSpan, ...]] = []
    part: list[SequenceSpan] = []
    done = 0
    for span in spans:
        while True:
            room = (len(parts) + 1) * num_tokens // num_parts - done
            taken = min(room, span.num_tokens)
            part.append(replace(span, num_tokens=taken))
            done += taken
            if taken == room:
                parts.append(tuple(part))
                part = []
            if taken == span.num_tokens:
                break
            span = replace(span, num_tokens=span.num_tokens - taken, num_cached=span.num_cached + taken)
    return parts
