"""From a request's tokens to the text its client may see: whole characters, up to the first stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.tokenizer import IncrementalDetokenizer, StopStrings, Tokenizer

PROMPT_TAIL_TOKENS = 16


@dataclass(frozen=True)
class TextDelta:
    """What is new: text that can change no more, and the stop string that has just ended it."""

    text: str
    matched: str | None = None


class TextStream:
    """One request's output; without a tokenizer there is no text, and no stop string can match."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int],
        stop_strings: tuple[str, ...] = (),
        tokens_min: int = 0,
    ):
        tail = prompt_ids[-PROMPT_TAIL_TOKENS:]
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer, tail)
        self._stops = StopStrings(stop_strings)
        self._tokens_before_stops_count = tokens_min

    def add(self, token_id: int) -> TextDelta:
        """Text that the next token makes certain."""
        if self._detokenizer is None:
            return TextDelta("")
        text = self._detokenizer.add([token_id])
        if self._tokens_before_stops_count > 0:
            self._tokens_before_stops_count -= 1
            return TextDelta(text)
        return TextDelta(*self._stops.add(text))

    def flush(self) -> TextDelta:
        """What was held back, once no more tokens come; it may end in a stop string, too."""
        if self._detokenizer is None:
            return TextDelta("")
        text, matched = self._stops.add(self._detokenizer.flush())
        return TextDelta(text if matched else text + self._stops.flush(), matched)
