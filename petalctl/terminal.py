"""Writing for people and for pipes: nothing from elsewhere may steer the user's terminal.

Models and peers can say anything, escape sequences too. What reaches a terminal has its control
characters replaced by visible signs; a pipe gets the text as it is.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

_TAB_AND_NEWLINE = {0x09, 0x0A}
_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))

_VISIBLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in _TAB_AND_NEWLINE},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}
_VISIBLE_IN_LINE = {
    **_VISIBLE,
    0x09: " ",
    0x0A: " ",
    0x2028: " ",
    0x2029: " ",
    **dict.fromkeys(_BIDIRECTIONAL, "\ufffd"),
}


def neutralise(text: str) -> str:
    """The text with control characters made visible, but for the tab and the newline."""
    return text.translate(_VISIBLE)


def neutralise_line(text: str, limit: int = 4096) -> str:
    """The text as one line that cannot change its surroundings, at most so long."""
    shown = text.translate(_VISIBLE_IN_LINE)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


class AnswerWriter:
    """Writes an answer's pieces as they come.

    Args:
        stream: usually standard output; its control characters are made visible on a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._is_at_line_start = True

    def write(self, text: str) -> None:
        """Writes a piece, and sees to it that it is seen now."""
        if text:
            self._stream.write(neutralise(text) if self._is_terminal else text)
            self._stream.flush()
            self._is_at_line_start = text.endswith("\n")

    def make_way(self) -> None:
        """Lets a line on standard error stand by itself, where both go to a terminal."""
        if self._is_terminal and sys.stderr.isatty():
            self.end_line()

    def end_line(self) -> None:
        """Sees to it that what comes next stands on a line of its own."""
        if not self._is_at_line_start:
            self.write("\n")


def tell(text: str) -> None:
    """One line for the person at the terminal, on standard error."""
    print(neutralise_line(text), file=sys.stderr, flush=True)


def prepare_standard_streams() -> None:
    """Makes output that the terminal's encoding lacks a question mark, rather than an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def give_up_standard_output() -> None:
    """After a broken pipe: lets the interpreter flush into nothing at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
