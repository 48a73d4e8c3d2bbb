"""What one peer knows of a model's servers.

Pure: it is fed with announcements and with what this peer measured itself, and knows no network and
no clock. Invariant: a `SwarmView` holds at most one entry for each peer, and its spans lie within
the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from p2p.wire.message import (
    Addresses,
    BlockNumber,
    Bound,
    Count,
    Digest,
    Name,
    Record,
)

MAX_ANNOUNCEMENT_BYTES = 4096


class ServerState(StrEnum):
    """Whether a server takes sessions."""

    SERVING = "serving"
    LEAVING = "leaving"


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement(Record):
    """What a server says of itself: the body of its signed record.

    Attributes:
        model: the fingerprint of the model.
        start: first block of the span.
        end: the block after the last one.
        state: a `ServerState`.
        step_ms: time of a decode step through the whole span, alone on the device, measured.
        cache_tokens: size of the KV-cache arena.
        free_cache_tokens: what of it is promised to nobody.
        dtype: in which it computes.
        quant: its weight format.
        version: of petald.
    """

    model: Digest
    start: BlockNumber
    end: BlockNumber
    state: Name
    step_ms: Annotated[float, Bound(0, 1e6)]
    cache_tokens: Count
    free_cache_tokens: Count
    dtype: Name
    quant: Name = "none"
    version: Name = "0"
    addresses: Addresses = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A server of the swarm view: its announcement, and what this peer knows beyond it.

    Attributes:
        peer: its peer id.
        round_trip_s: measured from here; none where it never was.
    """

    peer: str
    announcement: Announcement
    round_trip_s: float | None = None

    @property
    def start(self) -> int:
        """First block of its span."""
        return self.announcement.start

    @property
    def end(self) -> int:
        """The block after its last."""
        return self.announcement.end

    @property
    def is_serving(self) -> bool:
        """Whether it takes sessions, as far as it said."""
        return self.announcement.state == ServerState.SERVING


@dataclass(frozen=True, kw_only=True, slots=True)
class SwarmView:
    """The servers of one model, as one peer knows them now."""

    model: bytes
    num_blocks: int
    servers: tuple[Server, ...]

    def coverage(self) -> tuple[int, ...]:
        """For each block, how many servers hold it and take sessions."""
        counts = [0] * self.num_blocks
        for server in self.servers:
            if server.is_serving:
                for block in range(server.start, server.end):
                    counts[block] += 1
        return tuple(counts)


def make_view(model: bytes, num_blocks: int, servers: Iterable[Server]) -> SwarmView:
    """Keeps of the servers those whose announcement can be true of this model.

    Args:
        model: the fingerprint.
        num_blocks: of the model.
        servers: one for each peer.
    """
    return SwarmView(
        model=model,
        num_blocks=num_blocks,
        servers=tuple(
            server
            for server in servers
            if server.announcement.model == model and 0 <= server.start < server.end <= num_blocks
        ),
    )


def missing_ranges(coverage: Sequence[int]) -> list[tuple[int, int]]:
    """The half-open ranges of blocks that nobody covers."""
    ranges: list[tuple[int, int]] = []
    for block, count in enumerate(coverage):
        if count:
            continue
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges


def format_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """Ranges as people write spans: ``0:10, 20:30``."""
    return ", ".join(f"{start}:{end}" for start, end in ranges)


def directory_key(model: bytes) -> bytes:
    """The key, in Kademlia's space, under which a model's servers announce themselves."""
    return hashlib.sha256(b"/petald/model/" + model).digest()
