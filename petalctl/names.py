"""Short names for peers that people can tell apart."""

from __future__ import annotations

from collections.abc import Iterable

LEAST_CHARACTERS = 6


def shorten_peers(peers: Iterable[str]) -> dict[str, str]:
    """For each peer id its ending, as short as keeps them all different.

    Ids of one kind begin alike (``12D3KooW...``), so their endings tell them apart.
    """
    whole = sorted(set(peers))
    longest = max(map(len, whole), default=0)
    for length in range(LEAST_CHARACTERS, longest):
        endings = {peer[-length:] for peer in whole}
        if len(endings) == len(whole):
            return {peer: peer if len(peer) <= length else f"…{peer[-length:]}" for peer in whole}
    return {peer: peer for peer in whole}


def join_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    """Ranges of blocks as people write them: ``0:10, 20:30``."""
    return ", ".join(f"{start}:{end}" for start, end in ranges)
