"""Beats: only the author's are taken, and in their order."""

from __future__ import annotations

from p2p.beats import MAX_BEATS, BeatChain, is_beat

CHAIN = BeatChain(b"s" * 16)


def test_every_beat_is_known_by_every_earlier_one():
    for known_number in (0, 1, 7, MAX_BEATS):
        for number in (0, 1, 2, 7, 8, MAX_BEATS):
            expected = number >= known_number
            known = CHAIN.beat(known_number)
            assert is_beat(CHAIN.beat(number), number, known, known_number) == expected
    assert CHAIN.beat(0) == CHAIN.end


def test_what_is_not_of_the_chain_is_no_beat():
    assert not is_beat(CHAIN.beat(4), 3, CHAIN.end, 0)
    assert not is_beat(BeatChain(b"t" * 16).beat(3), 3, CHAIN.end, 0)
    assert not is_beat(b"", 3, CHAIN.end, 0)
    assert not is_beat(CHAIN.beat(MAX_BEATS), MAX_BEATS + 1, CHAIN.end, 0)
