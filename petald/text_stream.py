"""The stream of new text, as tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from kernels.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What the decoder writes for bytes that are no whole character, or not yet."""

WINDOW_TOKENS = 16
"""Decoded anew for each token: more than the words and characters that tokens are parts of."""

MAX_WINDOW_TOKENS = 32
"""When no good place to cut the window was found: only what is no text comes here."""

KEPT_TOKENS = 4
MAX_UNCERTAIN = 3
"""Characters at the end that a later byte may change: three bytes can wait for the fourth."""


class TextStream:
    """Text of tokens as they come, of which nothing is taken back.

    Held back are bytes that are no whole character yet, and text that may be the beginning of a
    stop text. How it works: a token's text may depend on those before it (a leading space, the
    bytes of one character), so a window of the last tokens is decoded as a whole, and what it has
    beyond what was given already is new. A full window is cut to its last tokens, so many that
    these alone decode to the same end. So a token costs the decoding of a few, however long the
    text is.

    Args:
        tokenizer: of the model.
        stop: texts at which the stream ends, before them; the first that is complete counts.

    Attributes:
        is_stopped: whether one was found.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._window: list[int] = []
        self._given = 0
        self._held = ""
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """Takes a token; gives the text that has become certain."""
        if self.is_stopped or token in self._tokenizer.special_ids:
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = len(text.rstrip(REPLACEMENT))
        if len(self._window) >= MAX_WINDOW_TOKENS:
            certain = max(certain, len(text) - MAX_UNCERTAIN)
        new = text[self._given : certain]
        self._given = min(max(self._given, certain), len(text))
        if len(self._window) >= WINDOW_TOKENS:
            self._cut_window(text)
        return self._release(new)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.is_stopped:
            return ""
        new = self._tokenizer.decode(self._window)[self._given :]
        self._window.clear()
        self._given = 0
        text = self._release(new)
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _cut_window(self, text: str) -> None:
        is_overfull = len(self._window) >= MAX_WINDOW_TOKENS
        if text.endswith(REPLACEMENT) and not is_overfull:
            return
        for count in range(KEPT_TOKENS, WINDOW_TOKENS):
            kept = self._window[-count:]
            kept_text = self._tokenizer.decode(kept)
            given = len(kept_text) - (len(text) - self._given)
            if given <= 0:
                continue  # a decoder may treat the first text in a special way: it must be past
            is_same_end = text.endswith(kept_text)
            if is_same_end or (is_overfull and kept_text[given:] == text[self._given :]):
                self._window = kept
                self._given = given
                break

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of a text are the first ones of a stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
