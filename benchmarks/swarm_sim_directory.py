"""The directory of a simulated swarm: what has been announced and is to be seen by now.

A swarm view of 10,000 servers takes milliseconds to add up, and in an hour of the simulation it
would be read a million times. So the sums over the servers are kept up here, one announcement at a
time, and a view is the sums less what the reader said itself. A test checks that they are what
`petald.block_load.read_load` gives.

The view of a large swarm is a sample. Servers are spread over 2**l shards by the first bits of a
hash, 48 to 96 in each (`p2p.shards`), and a view holds eight of them, the reader's own among them
(all, where there are no more). Which ones the others are is a matter of `Views`; the directory has
`Views.KIN`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from p2p.shards import HYSTERESIS, SERVERS_PER_SHARD, SHARDS_READ
from petald.block_load import BlockLoad, RivalClaim

Span = tuple[int, int]

HASH_BITS = 32


class Views(StrEnum):
    """What a server sees of a large swarm.

    Attributes:
        WHOLE: everything.
        KIN: the eight shards whose hashes begin as its own does: all that are in them see the same.
        DRAWN: its own shard, and seven that it has drawn once, each from another eighth.
        OWN: only its own shard.
    """

    WHOLE = "whole"
    KIN = "kin"
    DRAWN = "drawn"
    OWN = "own"


@dataclass(frozen=True, slots=True)
class Said:
    """What a server announces.

    Attributes:
        span: that it serves; none while it loads its first one.
        claim: the span that it is to serve.
        made_at_ms: when it claimed that.
        speed: block-steps a second.
    """

    span: Span | None
    claim: Span | None
    made_at_ms: int
    speed: float


class Shard:
    """Sums over some servers."""

    def __init__(self, num_blocks: int) -> None:
        self.throughput_L = np.zeros(num_blocks)
        self.counts_2L = np.zeros((2, num_blocks), np.int64)  # planned, settled
        self.servers = 0
        self.claims: dict[str, RivalClaim] = {}
        self.claims_told: tuple[RivalClaim, ...] = ()

    def add(self, said: Said, sign: int) -> None:
        add_said(said, sign, self.throughput_L, self.counts_2L)
        self.servers += sign

    def set_claim(self, peer: str, said: Said | None) -> None:
        if said is not None and said.claim is not None:
            self.claims[peer] = RivalClaim(
                peer=peer,
                made_at_ms=said.made_at_ms,
                old=said.span,
                new=said.claim,
                block_steps_per_s=said.speed,
            )
        elif self.claims.pop(peer, None) is None:
            return
        self.claims_told = tuple(self.claims.values())


class SimDirectory:
    """Sums over what is to be seen.

    Args:
        num_blocks: of the model.
        typical: block-steps a second of the median server.
        views: of a large swarm.
    """

    def __init__(self, num_blocks: int, typical: float, views: Views = Views.WHOLE) -> None:
        self.views = views
        self.level = 0
        self._num_blocks, self._typical = num_blocks, typical
        self._said: dict[str, Said] = {}
        self._all = Shard(num_blocks)
        self._parts = [self._all]
        self._drawn: dict[str, list[int]] = {}

    def put(self, peer: str, said: Said | None) -> None:
        """Replaces what a server said before; None: it is gone."""
        before = self._said.pop(peer, None)
        if said is not None:
            self._said[peer] = said
        part = self._parts[self._index(peer)]
        for shard in (self._all,) if part is self._all else (self._all, part):
            if before is not None:
                shard.add(before, -1)
            if said is not None:
                shard.add(said, 1)
            shard.set_claim(peer, said)
        if self.views != Views.WHOLE:
            self._set_level()

    def load_for(self, peer: str, *, whole: bool = False) -> BlockLoad:
        """What a server sees of the others."""
        shards = [self._all] if whole else self._shards_of(peer)
        throughput_L, counts_2L = shards[0].throughput_L.copy(), shards[0].counts_2L.copy()
        for shard in shards[1:]:
            throughput_L += shard.throughput_L
            counts_2L += shard.counts_2L
        own = self._said.get(peer)
        if own is not None:
            add_said(own, -1, throughput_L, counts_2L)
        planned_L, settled_L = counts_2L
        np.maximum(throughput_L, 0.0, out=throughput_L)
        throughput_L[planned_L <= 0] = 0.0
        claims = shards[0].claims_told
        for shard in shards[1:]:
            claims += shard.claims_told
        return BlockLoad(
            throughput_L=throughput_L,
            planned_L=planned_L,
            settled_L=settled_L,
            num_servers=sum(shard.servers for shard in shards),
            typical=self._typical,
            claims=claims,  # with the own one, which comes after none of those before it
            share=1.0 if shards[0] is self._all else self._share,
        )

    def seen_by(self, peer: str) -> int:
        """How many servers are in the view of one."""
        return sum(shard.servers for shard in self._shards_of(peer))

    def everyone(self) -> list[tuple[Span, float]]:
        """The span, claims counted as made, and the speed of every server."""
        found = []
        for said in self._said.values():
            span = said.claim or said.span
            assert span is not None
            found.append((span, said.speed))
        return found

    @property
    def _share(self) -> float:
        """The part of all servers that a view is about."""
        read = 1 if self.views == Views.OWN else SHARDS_READ
        return min(1.0, read / 2**self.level)

    def _bits(self) -> int:
        """Of the hash, how many tell the parts apart that sums are kept of.

        Eight shards that all read together are one part.
        """
        if self.level <= SHARDS_READ.bit_length() - 1 or self.views == Views.WHOLE:
            return 0
        return self.level - (SHARDS_READ.bit_length() - 1 if self.views == Views.KIN else 0)

    def _index(self, peer: str, bits: int | None = None) -> int:
        return int(peer[:8], 16) >> (HASH_BITS - (self._bits() if bits is None else bits))

    def _shards_of(self, peer: str) -> list[Shard]:
        bits = self._bits()
        if bits == 0 or self.views != Views.DRAWN:
            return [self._parts[self._index(peer, bits)]]
        points = self._drawn.get(peer)
        if points is None:
            rng, low = random.Random(peer), HASH_BITS - (SHARDS_READ.bit_length() - 1)
            own, others = int(peer[:8], 16), range(1, SHARDS_READ)
            points = self._drawn[peer] = [own] + [
                (own >> low ^ other) << low | rng.getrandbits(low) for other in others
            ]
        return [self._parts[point >> (HASH_BITS - bits)] for point in points]

    def _set_level(self) -> None:
        depth = math.log2(max(len(self._said), 1) / SERVERS_PER_SHARD)
        if self.level - HYSTERESIS <= depth < self.level + 1 + HYSTERESIS:
            return
        before, self.level = self._bits(), max(0, math.floor(depth))
        if self._bits() == before:
            return
        bits = self._bits()
        self._parts = [Shard(self._num_blocks) for _ in range(2**bits)] if bits else [self._all]
        if bits:
            for peer, said in self._said.items():
                part = self._parts[self._index(peer, bits)]
                part.add(said, 1)
                part.set_claim(peer, said)


def add_said(said: Said, sign: int, throughput_L: np.ndarray, counts_2L: np.ndarray) -> None:
    """Adds to sums what a server says, or takes it off."""
    start, end = said.claim or said.span or (0, 0)
    throughput_L[start:end] += sign * said.speed / (end - start)
    counts_2L[0, start:end] += sign
    if said.span is not None:
        start, end = max(start, said.span[0]), min(end, said.span[1])
        if start < end:
            counts_2L[1, start:end] += sign
