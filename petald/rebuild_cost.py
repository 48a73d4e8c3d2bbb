"""How long a hop takes to be rebuilt elsewhere: by replay, or from the old hop's cache.

Pure estimates, good enough to choose between the two and to tell whether a move pays.
"""

from __future__ import annotations

from dataclasses import dataclass

NEAR_ROUND_TRIP_S = 0.008
NEAR_BYTES_PER_S = 40e6
FAR_BYTES_PER_S = 2.5e6
"""Until bandwidth is measured: a peer within one house or rack, whose answer may wait for a busy
processor, moves what py-libp2p can carry (tens of MB/s on loopback), any other what a home's uplink
of 20 Mbit/s does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RebuildCost:
    """What is known of a hop that is to be rebuilt.

    Attributes:
        token_s: time of one more token of a replay through its blocks, on the new server.
        row_bytes: of the hidden states of one token.
        cache_bytes: of one token's keys and values in all its blocks.
        client_round_trip_s: from the client to the new server.
        round_trip_s: from the old server to the new one.
    """

    token_s: float
    row_bytes: int
    cache_bytes: int
    client_round_trip_s: float
    round_trip_s: float

    def replay_s(self, tokens: int) -> float:
        """By replay of the client's history: transfer and computing overlap, in pieces."""
        transfer_s = tokens * self.row_bytes / _bytes_per_s(self.client_round_trip_s)
        return self.client_round_trip_s + max(transfer_s, tokens * self.token_s)

    def hand_over_s(self, tokens: int) -> float:
        """By a copy of the old hop's cache."""
        transfer_s = tokens * self.cache_bytes / _bytes_per_s(self.round_trip_s)
        return 2 * self.round_trip_s + transfer_s


def _bytes_per_s(round_trip_s: float) -> float:
    return NEAR_BYTES_PER_S if round_trip_s <= NEAR_ROUND_TRIP_S else FAR_BYTES_PER_S
