"""Turns one sequence's token ids into text deltas, as they come; knows no request and no transport.

The deltas joined are exactly `Tokenizer.decode` of all ids (up to the stop string): no delta ends inside a UTF-8
character, and no part of a stop string is ever shown. Work is linear in the bytes and the number of stop strings.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from llama4_dist.text.stop_strings import StopStrings
from llama4_dist.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text that may be shown now. `num_tokens` ids of the push were used: all, or those up to the stop string."""

    text: str
    stop_match: str | None = None
    num_tokens: int = 0


class TextStream:
    """Incremental detokenisation of one sequence, with stop strings.

    A stop string that is complete within the first `min_tokens` ids does not stop the sequence.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopStrings(stop)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._ended = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next ids; return the text they release. Ids after a stop string are not used."""
        texts: list[str] = []
        for place, token_id in enumerate(token_ids):
            if self._ended:
                return TextDelta(text="".join(texts))
            self._num_tokens += 1
            decoded = self._utf8.decode(self._tokenizer.shown_bytes(token_id, self._skip_special_tokens))
            stop = self._take(decoded, texts)
            if stop is not None:
                return TextDelta(text="".join(texts), stop_match=stop, num_tokens=place + 1)
        return TextDelta(text="".join(texts), num_tokens=len(token_ids))

    def finish(self) -> TextDelta:
        """End the sequence; return what was held back. A character that never became whole is U+FFFD."""
        if self._ended:
            return TextDelta(text="")
        texts: list[str] = []
        stop = self._take(self._utf8.decode(b"", final=True), texts)
        if stop is None:
            texts.append(self._held)
        self._ended = True
        return TextDelta(text="".join(texts), stop_match=stop)

    def _take(self, decoded: str, texts: list[str]) -> str | None:
        """Append to `texts` what `decoded` makes safe to show; return the stop string it completes."""
        for place, character in enumerate(decoded):
            stop = self._stops.read(character)
            if stop is not None and self._num_tokens > self._min_tokens:
                shown = self._held + decoded[: place + 1]
                texts.append(shown if self._include_stop else shown[: len(shown) - len(stop)])
                self._ended = True
                return stop
        text = self._held + decoded
        num_safe = len(text) if self._include_stop else len(text) - self._stops.held
        texts.append(text[:num_safe])
        self._held = text[num_safe:]
        return None
