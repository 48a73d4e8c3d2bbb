"""Beats: how a peer says again and again, in 16 bytes, that its signed record still holds.

Pure. Of a chain in which each value is the hash of the one after it, the signed record holds the
end. Beat n is the value n places before the end: whoever knows the record can check it by hashing
n times, and nobody but the author can make one (Lamport's one-time passwords, CACM 24(11), 1981).
Beats are numbered by time: beat n says that the author lived n times `BEAT_S` after it signed.

This is worth its code: a refresh needs no signature (the holder of 800 records saves 800 checks of
some 100 us in each period), a reader gets 35 bytes instead of a record of some 600, and a holder
that keeps a crashed server's record alive is seen through by everybody.
"""

from __future__ import annotations

import hashlib

BEAT_BYTES = 16
"""128 bits: whoever would make a beat has to invert the hash."""

BEAT_S = 10.0
"""Less than the 12 s between two announcements, so that each has a beat of its own."""

MAX_BEATS = 360
"""An hour, then a new record is signed; to check a beat takes so many hashes at most, 0.2 ms."""


class BeatChain:
    """An author's chain for one record.

    Args:
        seed: 16 secret bytes, used once.
    """

    def __init__(self, seed: bytes) -> None:
        values = [seed]
        for _ in range(MAX_BEATS):
            values.append(beat_before(values[-1]))
        values.reverse()
        self._values = values

    @property
    def end(self) -> bytes:
        """What the record holds: beat 0."""
        return self._values[0]

    def beat(self, number: int) -> bytes:
        """The beat of that number; after `MAX_BEATS` there is none."""
        return self._values[number]


def beat_before(beat: bytes) -> bytes:
    """The beat whose number is less by one."""
    return hashlib.sha256(b"petald-beat-1" + beat).digest()[:BEAT_BYTES]


def is_beat(beat: bytes, number: int, known: bytes, known_number: int) -> bool:
    """Whether a beat belongs to the chain of which an earlier one (or the same) is known."""
    if not known_number <= number <= MAX_BEATS:
        return False
    for _ in range(number - known_number):
        beat = beat_before(beat)
    return beat == known
