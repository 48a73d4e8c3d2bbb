"""How well each block of a model is served: what a choice of a span and a move are decided by.

Pure. It is read from a swarm view, or kept up by a simulation; the own server is never in it. A
server that hosts ``n`` blocks and does ``v`` block-steps a second gives ``v / n`` steps a second to
each of its blocks. A claim counts as made already: what two servers see of each other's plans must
not make both go to one place. What is *settled* on a block, though, is only who serves it now and
stays on it: nobody may leave a block trusting in a server that is about to leave, or yet to come.

Shapes: L blocks, N servers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from petald.swarm import Floats, Integers, Server, ServerState, SwarmView

MOST_OF_TYPICAL = 100.0
"""A server counts for at most this many typical ones: what it announces of itself is not checked,
and one that lies must not make the rest of the swarm seem to be nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a server can do for a model.

    Attributes:
        fit: how many blocks it can host at most.
        block_steps_per_s: decode steps through one block that it does in a second; zero where it
            was not measured, and then it is taken for a typical one of the swarm.
        missing: blocks that it cannot host, since it has not got their weights.
    """

    fit: int
    block_steps_per_s: float = 0.0
    missing: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class RivalClaim:
    """Another server's claim.

    Attributes:
        peer: whose.
        made_at_ms: when, by its own clock.
        old: the span that it serves now; none where it is only about to join.
        new: the span that it claims.
        block_steps_per_s: what it does.
    """

    peer: str
    made_at_ms: int
    old: tuple[int, int] | None
    new: tuple[int, int]
    block_steps_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLoad:
    """What the other servers of a model give to each of its blocks.

    Attributes:
        throughput_L: steps a second, claims counted as made.
        planned_L: how many servers serve the block once all claims are made.
        settled_L: how many serve it now, and do after their claims.
        num_servers: in all.
        typical: block-steps a second of the median server; 1 where none was measured.
        claims: of the other servers.
        share: the part of all servers that the above is about, over 0: the view of a large swarm is
            a sample.
    """

    throughput_L: Floats
    planned_L: Integers
    settled_L: Integers
    num_servers: int = 0
    typical: float = 1.0
    claims: tuple[RivalClaim, ...] = ()
    share: float = 1.0

    @property
    def num_blocks(self) -> int:
        """Of the model."""
        return len(self.throughput_L)

    @property
    def has_gap(self) -> bool:
        """Whether there is a block that nobody of these serves or is to serve."""
        return not self.planned_L.all()

    def speed_of(self, capacity: Capacity) -> float:
        """What a server does, as far as that is known and to be believed; above zero."""
        speed = capacity.block_steps_per_s or self.typical
        return min(speed, MOST_OF_TYPICAL * self.typical) if self.num_servers else speed

    def without_claims_after(self, made_at_ms: int, peer: str) -> BlockLoad:
        """The load as if the claims that come after a given one had not been made.

        Of claims that exclude each other the earlier one counts, and then the lesser peer id: so
        whoever claims decides by those before it alone, and the others give way. That they will is
        not sure until they did, though: before a block is left, it counts who is settled on it by
        all claims.
        """
        later = [one for one in self.claims if (one.made_at_ms, one.peer) > (made_at_ms, peer)]
        if not later:
            return self
        throughput_L, planned_L = self.throughput_L.copy(), self.planned_L.copy()
        settled_L = self.settled_L.copy()
        for one in later:
            if one.old is not None:
                settled_L[slice(*one.old)] += 1
                start, end = max(one.old[0], one.new[0]), min(one.old[1], one.new[1])
                settled_L[start : max(start, end)] -= 1
            for span, sign in ((one.new, -1), (one.old, 1)):
                if span is not None:
                    start, end = span
                    throughput_L[start:end] += sign * one.block_steps_per_s / (end - start)
                    planned_L[start:end] += sign
        earlier = tuple(
            one for one in self.claims if (one.made_at_ms, one.peer) <= (made_at_ms, peer)
        )
        throughput_L = np.maximum(throughput_L, 0.0)  # the last bits of sums and differences
        return replace(
            self,
            throughput_L=throughput_L,
            planned_L=planned_L,
            settled_L=settled_L,
            claims=earlier,
        )


def wants_whole(sample: BlockLoad, *, is_urgent: bool = False) -> bool:
    """Whether it takes the whole view to decide well: see `confirm_gaps`.

    Args:
        sample: what is known.
        is_urgent: whether the server that asks has claimed blocks because nobody served them.
    """
    return sample.share < 1 and (is_urgent or sample.has_gap)


def confirm_gaps(sample: BlockLoad, whole: BlockLoad, *, is_urgent: bool = False) -> BlockLoad:
    """What to decide by where a sample lacks blocks.

    Those that others hold are only weak ones, as far as the sample's servers are concerned: they
    even out what they do among themselves. Where a block is nobody's, all servers of the swarm
    decide by the same whole view, and see each other's claims in it.

    Args:
        sample: that lacks blocks.
        whole: about all servers, read since.
        is_urgent: as in `wants_whole`.
    """
    if is_urgent or whole.has_gap:
        return whole
    return replace(sample, planned_L=np.maximum(sample.planned_L, 1))


def read_load(view: SwarmView, *, own: str | None = None) -> BlockLoad:
    """Adds up what the servers of a view say of themselves.

    A server that takes no sessions counts where it claims a span: it is loading that one. A server
    that announces no speed is taken for a typical one.

    Args:
        view: the swarm view.
        own: the peer id of the server that asks, which is left out.
    """
    servers = [server for server in view.servers if server.peer != own and _counts(server, view)]
    speeds = _speeds(servers)
    count = view.num_blocks
    throughput, planned, settled = (np.zeros(count + 1) for _ in range(3))
    claims: list[RivalClaim] = []
    spans = []
    for server, speed in zip(servers, speeds, strict=True):
        claim = server.announcement.claim
        old = (server.start, server.end) if server.is_serving else None
        new = old if claim is None else (claim.start, claim.end)
        if new is None:
            continue
        spans.append((*new, speed))
        if claim is not None:
            rival = RivalClaim(
                peer=server.peer,
                made_at_ms=claim.made_at_ms,
                old=old,
                new=new,
                block_steps_per_s=float(speed),
            )
            claims.append(rival)
        if old is not None:
            start, end = max(old[0], new[0]), min(old[1], new[1])
            if start < end:
                settled[start] += 1
                settled[end] -= 1
    if spans:
        starts, ends = (np.array(column, np.int64) for column in list(zip(*spans, strict=True))[:2])
        shares = np.array([speed for *_, speed in spans]) / (ends - starts)
        np.add.at(throughput, starts, shares)
        np.add.at(throughput, ends, -shares)
        np.add.at(planned, starts, 1)
        np.add.at(planned, ends, -1)
    planned_L = np.cumsum(planned)[:-1].astype(np.int64)
    throughput_L = np.maximum(np.cumsum(throughput)[:-1], 0.0)
    return BlockLoad(
        throughput_L=np.where(planned_L > 0, throughput_L, 0.0),
        planned_L=planned_L,
        settled_L=np.cumsum(settled)[:-1].astype(np.int64),
        num_servers=len(spans),
        typical=float(np.median(speeds)) if len(speeds) else 1.0,
        claims=tuple(claims),
        share=view.share,
    )


def _counts(server: Server, view: SwarmView) -> bool:
    claim = server.announcement.claim
    if claim is not None:
        is_leaving = server.announcement.state == ServerState.LEAVING
        return not is_leaving and 0 <= claim.start < claim.end <= view.num_blocks
    return server.is_serving


def _speeds(servers: Iterable[Server]) -> Floats:
    """Block-steps a second of each server, within reason."""
    speeds = np.array([server.block_steps_per_s for server in servers], np.float64)
    measured = speeds[speeds > 0]
    typical = float(np.median(measured)) if len(measured) else 1.0
    return np.where(speeds > 0, np.minimum(speeds, MOST_OF_TYPICAL * typical), typical)
