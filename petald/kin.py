"""Whom a server evens out the blocks' throughputs with, where the view of a swarm is a sample.

Pure. A sample of 576 servers tells what a block's throughput is to about a fifth; who trusted in it
would mend noise that nobody else sees. But groups of servers that each are even add up to a swarm
that is even. So a server decides by its *kin* alone: those whose digests begin as its own does, all
eight shards of a sample where they do, and otherwise its own shard. Invariant: all kin have the
same kin, so among them all is as in a small swarm. `benchmarks/swarm_sim.py` compares it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from petald.swarm import SwarmView, peer_digest

SHARDS_READ = 8
"""Of how many shards a sample is. In a swarm of so many or fewer all are read."""


def view_kin(view: SwarmView, own: str) -> SwarmView:
    """The view without those that are not kin; all of it, where it is of the whole swarm.

    Args:
        view: of one server; of a large swarm it holds eight shards, the server's own among them.
        own: the peer id of the server.
    """
    if view.share >= 1:
        return view
    level = round(math.log2(SHARDS_READ / view.share))
    alike = level - round(math.log2(SHARDS_READ))
    first = _first_bits(own, alike)
    if all(_first_bits(server.peer, alike) == first for server in view.servers):
        return view
    shard = _first_bits(own, level)
    kin = tuple(server for server in view.servers if _first_bits(server.peer, level) == shard)
    return replace(view, servers=kin, share=view.share / SHARDS_READ)


def _first_bits(peer: str, count: int) -> int:
    return int.from_bytes(peer_digest(peer)[:4]) >> (32 - count)
