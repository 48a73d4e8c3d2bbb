"""The outline of a msgpack body: how many values it holds, and how deeply, before they are made.

One byte of msgpack can be a map that takes 64 bytes in memory, and five bytes can announce an array
of billions: a body within the limit of a frame could take a hundred times its size. `check_outline`
walks over a body without making anything. Invariant: what it lets through becomes at most
`MAX_VALUES` objects, `MAX_CONTAINERS` of them maps or lists, at most `MAX_DEPTH` deep.
"""

from __future__ import annotations

from p2p.errors import MessageTooLarge

MAX_VALUES = 2**21
"""Twice the longest list of any message, which is a prompt of 2**20 tokens."""

MAX_CONTAINERS = 2**18
"""Four times the longest list of maps, which is the servers of a swarm's report."""

MAX_DEPTH = 16
SMALL_BODY_BYTES = 4096
"""Smaller bodies need no walk: they cannot become more than a few hundred KB."""

SCALAR, SIZED, LIST, MAP = range(4)


def check_outline(body: bytes | memoryview) -> None:
    """Walks over a body; one that is cut off or no msgpack passes: its reader will notice.

    Raises:
        MessageTooLarge: it holds, or announces, more than this module's limits.
    """
    size = len(body)
    position = 0
    values = 1
    containers = 0
    left = 1
    outer: list[int] = []
    while position < size:
        while not left:
            if not outer:
                return
            left = outer.pop()
        left -= 1
        kind, skip, length_bytes = _OUTLINES[body[position]]
        if kind == SCALAR:
            position += skip
            continue
        if length_bytes:
            length = int.from_bytes(body[position + 1 : position + 1 + length_bytes], "big")
        else:
            length = body[position] & (0x0F if kind != SIZED else 0x1F)
        position += skip
        if kind == SIZED:
            position += length
            continue
        if kind == MAP:
            length *= 2
        values += length
        containers += 1
        if values > MAX_VALUES or containers > MAX_CONTAINERS:
            raise MessageTooLarge(
                f"a message of more than {MAX_VALUES} values, or of {MAX_CONTAINERS} maps and "
                "lists, was announced"
            )
        outer.append(left)
        left = length
        if len(outer) > MAX_DEPTH:
            raise MessageTooLarge(f"a message of more than {MAX_DEPTH} levels came")


def _outline_of(code: int) -> tuple[int, int, int]:
    """Kind, bytes before the content, and bytes of the length: msgpack's spec, "Formats"."""
    if code <= 0x7F or code >= 0xE0 or code in (0xC0, 0xC2, 0xC3):
        return SCALAR, 1, 0
    if code <= 0x8F:
        return MAP, 1, 0
    if code <= 0x9F:
        return LIST, 1, 0
    if code <= 0xBF:
        return SIZED, 1, 0
    return _LONG_FORMS[code]


_LONG_FORMS = {
    0xC1: (SCALAR, 1, 0),  # never used; the reader refuses it
    **{0xC4 + step: (SIZED, 1 + (1 << step), 1 << step) for step in range(3)},  # bin
    **{0xC7 + step: (SIZED, 2 + (1 << step), 1 << step) for step in range(3)},  # ext
    0xCA: (SCALAR, 5, 0),
    0xCB: (SCALAR, 9, 0),
    **{0xCC + step: (SCALAR, 1 + (1 << step), 0) for step in range(4)},  # uint
    **{0xD0 + step: (SCALAR, 1 + (1 << step), 0) for step in range(4)},  # int
    **{0xD4 + step: (SCALAR, 2 + (1 << step), 0) for step in range(5)},  # fixext
    **{0xD9 + step: (SIZED, 1 + (1 << step), 1 << step) for step in range(3)},  # str
    0xDC: (LIST, 3, 2),
    0xDD: (LIST, 5, 4),
    0xDE: (MAP, 3, 2),
    0xDF: (MAP, 5, 4),
}
_OUTLINES = [_outline_of(code) for code in range(256)]
