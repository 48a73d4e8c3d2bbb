"""Whom a server decides its place with, in a swarm that is read in samples."""

from __future__ import annotations

from dataclasses import replace

from petald.kin import view_kin
from petald.swarm import SwarmView, peer_digest
from tests.helpers.placement_world import announcement, view_of

LEVEL = 5
PEERS = [f"peer{number}" for number in range(2000)]
OWN = PEERS[0]


def shard(peer: str, level: int = LEVEL) -> int:
    return peer_digest(peer)[0] >> (8 - level)


def sample(shards: set[int]) -> SwarmView:
    """What is read of a swarm of 32 shards."""
    said = {peer: announcement(0, 4) for peer in PEERS if shard(peer) in shards}
    return replace(view_of(8, said), share=len(shards) / 2**LEVEL)


def peers(view: SwarmView) -> set[str]:
    return {server.peer for server in view.servers}


def test_all_are_kin_in_a_swarm_that_is_read_whole() -> None:
    view = sample(set(range(32)))
    assert view_kin(view, OWN) is view


def test_eight_shards_that_begin_alike_are_kin() -> None:
    first = shard(OWN) >> 3 << 3
    view = sample(set(range(first, first + 8)))
    kin = view_kin(view, OWN)
    assert peers(kin) == peers(view)
    assert kin.share == 8 / 32


def test_of_shards_that_were_drawn_only_the_own_is_kin() -> None:
    own = shard(OWN)
    kin = view_kin(sample({own} | {own ^ other for other in (1, 4, 9, 14, 18, 21, 28)}), OWN)
    assert {shard(peer) for peer in peers(kin)} == {own}
    assert kin.share == 1 / 32


def test_all_kin_have_the_same_kin() -> None:
    first = shard(OWN) >> 3 << 3
    view = sample(set(range(first, first + 8)))
    for own in list(peers(view))[:20]:
        assert peers(view_kin(view, own)) == peers(view)
