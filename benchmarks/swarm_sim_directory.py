"""The directory of a simulated swarm: what has been announced and is to be seen by now.

A swarm view of 10,000 servers takes milliseconds to add up, and in an hour of the simulation it
would be read a million times. So the sums over the servers are kept up here, one announcement at a
time, and a view is the sums less what the reader said itself. A test checks that they are what
`petald.block_load.read_load` gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from petald.block_load import BlockLoad, RivalClaim

Span = tuple[int, int]


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


class SimDirectory:
    """Sums over what is to be seen.

    Args:
        num_blocks: of the model.
        typical: block-steps a second of the median server.
    """

    def __init__(self, num_blocks: int, typical: float) -> None:
        self._typical = typical
        self._throughput_L = np.zeros(num_blocks)
        self._planned_L = np.zeros(num_blocks, np.int64)
        self._settled_L = np.zeros(num_blocks, np.int64)
        self._said: dict[str, Said] = {}
        self._claims: dict[str, RivalClaim] = {}
        self._claims_told: tuple[RivalClaim, ...] = ()

    def put(self, peer: str, said: Said | None) -> None:
        """Replaces what a server said before; None: it is gone."""
        before = self._said.pop(peer, None)
        if before is not None:
            self._add(before, -1, self._throughput_L, self._planned_L, self._settled_L)
        if said is not None:
            self._said[peer] = said
            self._add(said, 1, self._throughput_L, self._planned_L, self._settled_L)
        if said is not None and said.claim is not None:
            self._claims[peer] = RivalClaim(
                peer=peer,
                made_at_ms=said.made_at_ms,
                old=said.span,
                new=said.claim,
                block_steps_per_s=said.speed,
            )
        elif self._claims.pop(peer, None) is None:
            return
        self._claims_told = tuple(self._claims.values())

    def load_for(self, peer: str) -> BlockLoad:
        """What a server sees of the others."""
        throughput_L = self._throughput_L.copy()
        planned_L, settled_L = self._planned_L.copy(), self._settled_L.copy()
        own = self._said.get(peer)
        if own is not None:
            self._add(own, -1, throughput_L, planned_L, settled_L)
        return BlockLoad(
            throughput_L=np.where(planned_L > 0, np.maximum(throughput_L, 0.0), 0.0),
            planned_L=planned_L,
            settled_L=settled_L,
            num_servers=len(self._said),
            typical=self._typical,
            claims=self._claims_told,  # with the own one, which comes after none of those before it
        )

    def everyone(self) -> list[tuple[Span, float]]:
        """The span, claims counted as made, and the speed of every server."""
        found = []
        for said in self._said.values():
            span = said.claim or said.span
            assert span is not None
            found.append((span, said.speed))
        return found

    @staticmethod
    def _add(
        said: Said,
        sign: int,
        throughput_L: np.ndarray,
        planned_L: np.ndarray,
        settled_L: np.ndarray,
    ) -> None:
        start, end = said.claim or said.span or (0, 0)
        throughput_L[start:end] += sign * said.speed / (end - start)
        planned_L[start:end] += sign
        if said.span is not None:
            start, end = max(start, said.span[0]), min(end, said.span[1])
            settled_L[start : max(start, end)] += sign
