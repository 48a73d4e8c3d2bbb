"""What one peer knows of a model's servers.

Pure: it is fed with announcements and with what this peer measured itself, and knows no network and
no clock. Invariant: a `SwarmView` holds at most one entry for each peer, and its spans lie within
the model.

Shapes: N servers in the order of their peer ids, E ordered pairs of servers with a known way.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from operator import attrgetter
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt

from p2p.shards import peer_digest as peer_digest  # the announcements' name for a peer, too
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
MAX_ROUND_TRIPS = 4
"""Some 28 bytes each. In a small swarm these are all next hops that there are; in one of 10,000
servers a choice of a chain reckons with 80,000 known ways, which takes it some 45 ms."""

MAX_ADAPTERS = 8
"""That a server can announce: some 80 bytes each."""

PREFILL_SPEED_UP = 4.0
"""A token within a prefill takes a quarter of a decode step, at most, where nothing was measured:
the weights are read once for many tokens."""

LEAST_BLOCK_MS = 1e-3
"""Of what a server says that a block takes: to start one of its kernels takes longer. What it says
is not checked otherwise, and a rate made of next to nothing would be infinite."""

LEAST_RATE = 1e-3
"""Of what a server says that it gives, in block-steps a second, for the like reason."""

Milliseconds = Annotated[float, Bound(0, 1e6)]
AdapterName = Annotated[str, Bound(1, 96)]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


class ServerState(StrEnum):
    """Whether a server takes sessions.

    One that is loading does not yet: its claim tells which blocks it will host.
    """

    LOADING = "loading"
    SERVING = "serving"
    LEAVING = "leaving"


def adapter_full_name(name: str, digest: bytes) -> str:
    """What an adapter that servers host is announced as.

    Args:
        name: as a server's owner calls it.
        digest: of the whole adapter, so that servers with other numbers under the same name are
            told apart.
    """
    return f"{name}@{digest.hex()[:16]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTripTo:
    """A round trip that a server measured.

    Attributes:
        peer: the other's `peer_digest`.
        ms: from the server to it and back.
    """

    peer: Annotated[bytes, Bound(8, 8)]
    ms: Milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A move that a server is about to make, told so that no two make the same one.

    Attributes:
        start: first block of the span that it will host.
        end: the block after the last one.
        made_at_ms: when it was claimed, by the server's own clock, since the epoch; of two claims
            that exclude each other, the earlier one counts, and then the lesser peer id.
    """

    start: BlockNumber
    end: BlockNumber
    made_at_ms: Count


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
        codec: in which it writes its outputs where a job leaves that to it; ``auto``: in what is
            quickest.
        version: of petald.
        queue_ms: mean time that a decode step lately waited for the device.
        prefill_ms: time for each token of a prefill through the whole span; zero where unknown.
        send_ms: time that the hidden states of one token take to leave, by what this server's links
            carry and as long as they are without a codec; zero where unknown.
        round_trips: to its likely next hops; the first one counts where a peer stands twice.
        adapters: that it hosts, by their full names; see `adapter_full_name`.
        claim: the move that it is about to make; none: it stays.
        block_steps_per_s: decode steps through one block that it gives the swarm in a second, as
            far as peers may use the device: what placement goes by, and so kept still
            (`petald.steady_rate`), where ``step_ms`` follows the moment; zero where unknown.
    """

    model: Digest
    start: BlockNumber
    end: BlockNumber
    state: Name
    step_ms: Milliseconds
    cache_tokens: Count
    free_cache_tokens: Count
    dtype: Name
    quant: Name = "none"
    codec: Name = "auto"
    version: Name = "0"
    addresses: Addresses = ()
    queue_ms: Milliseconds = 0.0
    prefill_ms: Milliseconds = 0.0
    send_ms: Milliseconds = 0.0
    round_trips: Annotated[tuple[RoundTripTo, ...], Bound(0, MAX_ROUND_TRIPS)] = ()
    adapters: Annotated[tuple[AdapterName, ...], Bound(0, MAX_ADAPTERS)] = ()
    claim: Claim | None = None
    block_steps_per_s: Annotated[float, Bound(0, 1e9)] = 0.0


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
    def step_ms(self) -> float:
        """Of a decode step through its span, not less than can be; zero where it was not told."""
        told_ms = self.announcement.step_ms
        return max(told_ms, LEAST_BLOCK_MS * (self.end - self.start)) if told_ms > 0 else 0.0

    @property
    def block_steps_per_s(self) -> float:
        """That it gives, not more than can be; by its step's time where it did not tell, or 0."""
        most = 1e3 / LEAST_BLOCK_MS
        told = self.announcement.block_steps_per_s
        if told > 0:
            return min(max(told, LEAST_RATE), most)
        return 1e3 * (self.end - self.start) / self.step_ms if self.step_ms > 0 else 0.0

    @property
    def is_serving(self) -> bool:
        """Whether it takes sessions, as far as it said."""
        return self.announcement.state == ServerState.SERVING


@dataclass(frozen=True, slots=True)
class KnownWays:
    """The ordered pairs of servers whose way one of the two measured.

    Sorted by the server that is left, then by the one that is reached. A pair is known in both
    directions or in neither, so that the pairs that lead to a server stand under the same
    positions as those that lead from it.

    Attributes:
        first: (N + 1,) where in the others the pairs of each server begin.
        to: (E,) the other server's position.
        way_s: (E,) one way to it: half of what this server announced, or else the other one.
        way_back_s: (E,) one way from it.
    """

    first: Integers
    to: Integers
    way_s: Floats
    way_back_s: Floats

    def of(self, position: int) -> slice:
        """Where the pairs of one server stand."""
        return slice(int(self.first[position]), int(self.first[position + 1]))

    @classmethod
    def read(cls, servers: Sequence[Server]) -> Self:
        """Reads the round trips that servers announced to each other."""
        count = len(servers)
        lists = [server.announcement.round_trips for server in servers]
        trips = list(chain.from_iterable(lists))
        positions = {
            peer_digest(server.peer): position
            for position, server in reversed(list(enumerate(servers)))
        }
        by = np.repeat(np.arange(count), np.fromiter(map(len, lists), np.int64, count))
        to = np.array([positions.get(trip.peer, -1) for trip in trips], np.int64)
        way_s = np.array(list(map(attrgetter("ms"), trips)), np.float64) / 2e3
        is_pair = (to >= 0) & (to != by)
        by, to, way_s = by[is_pair], to[is_pair], way_s[is_pair]
        # What was announced comes before its reverse: of several for a pair the first is kept.
        by, to, way_s = np.r_[by, to], np.r_[to, by], np.r_[way_s, way_s]
        narrow = np.uint16 if count < 1 << 16 else np.int64  # numpy sorts 16 bits in linear time
        order = np.argsort(to.astype(narrow), kind="stable")
        order = order[np.argsort(by[order].astype(narrow), kind="stable")]
        by, to, way_s = by[order], to[order], way_s[order]
        is_first = np.ones(len(by), np.bool_)
        is_first[1:] = (by[1:] != by[:-1]) | (to[1:] != to[:-1])
        by, to, way_s = by[is_first], to[is_first], way_s[is_first]
        way_back_s = way_s[np.argsort(to.astype(narrow), kind="stable")]
        first = np.r_[0, np.cumsum(np.bincount(by, minlength=count))]
        return cls(first=first, to=to, way_s=way_s, way_back_s=way_back_s)


@dataclass(frozen=True)  # without slots, for what is kept beside the fields
class Columns:
    """The servers of a view as arrays, in the order of their peer ids.

    Attributes:
        servers: N of them.
        position: of each peer.
        start: (N,) first block of the span.
        end: (N,) the block after the last one.
        block_s: (N,) time of a decode step through one block.
        token_s: (N,) time of a token through one block, within a prefill; estimated from the decode
            step where the server announced none.
        queue_s: (N,) time that a step waits for the device.
        send_s: (N,) time that a step's output takes to leave, beside the way that it has.
        free_cache_tokens: (N,), or -1 where the server takes no sessions.
        round_trip_s: (N,) from here; NaN where it was never measured.
    """

    servers: tuple[Server, ...]
    position: dict[str, int]
    start: npt.NDArray[np.int16]
    end: npt.NDArray[np.int16]
    block_s: Floats
    token_s: Floats
    queue_s: Floats
    send_s: Floats
    free_cache_tokens: Integers
    round_trip_s: Floats

    @functools.cached_property
    def ways(self) -> KnownWays:
        """Between the servers; made once, for a choice that asks for them."""
        return KnownWays.read(self.servers)

    @functools.cached_property
    def adapters(self) -> dict[str, Booleans]:
        """For the full name of each adapter that some host, (N,) which do; made once, likewise."""
        found: dict[str, Booleans] = {}
        for position, server in enumerate(self.servers):
            for name in server.announcement.adapters:
                if name not in found:
                    found[name] = np.zeros(len(self.servers), np.bool_)
                found[name][position] = True
        return found

    @classmethod
    def read(cls, servers: Iterable[Server]) -> Self:
        """Sorts servers and takes out what a route is chosen by."""
        ordered = tuple(sorted(servers, key=attrgetter("peer")))
        said = [server.announcement for server in ordered]
        start = np.array([one.start for one in said], np.int16)
        end = np.array([one.end for one in said], np.int16)
        step_ms = np.array([one.step_ms for one in said], np.float64)
        prefill_ms = np.array([one.prefill_ms for one in said], np.float64)
        token_ms = np.where(prefill_ms > 0, prefill_ms, step_ms / PREFILL_SPEED_UP)
        free = [one.free_cache_tokens if one.state == ServerState.SERVING else -1 for one in said]
        return cls(
            servers=ordered,
            position={server.peer: position for position, server in enumerate(ordered)},
            start=start,
            end=end,
            block_s=step_ms / 1e3 / (end - start),
            token_s=token_ms / 1e3 / (end - start),
            queue_s=np.array([one.queue_ms for one in said], np.float64) / 1e3,
            send_s=np.array([one.send_ms for one in said], np.float64) / 1e3,
            free_cache_tokens=np.array(free, np.int64),
            round_trip_s=np.array([server.round_trip_s for server in ordered], np.float64),
        )


@dataclass(frozen=True, kw_only=True)  # without slots, for what is kept beside the fields
class SwarmView:
    """The servers of one model, as one peer knows them now.

    Attributes:
        model: the fingerprint.
        num_blocks: of the model.
        servers: those that are known, one for each peer.
        share: the part of all servers that these are about, over 0: the view of a large swarm is a
            sample.
    """

    model: bytes
    num_blocks: int
    servers: tuple[Server, ...]
    share: float = 1.0

    @functools.cached_property
    def columns(self) -> Columns:
        """The servers as arrays, made once."""
        return Columns.read(self.servers)

    def coverage(self) -> tuple[int, ...]:
        """For each block, how many servers hold it and take sessions."""
        counts = [0] * self.num_blocks
        for server in self.servers:
            if server.is_serving:
                for block in range(server.start, server.end):
                    counts[block] += 1
        return tuple(counts)


def make_view(
    model: bytes, num_blocks: int, servers: Iterable[Server], *, share: float = 1.0
) -> SwarmView:
    """Keeps of the servers those whose announcement can be true of this model.

    Args:
        model: the fingerprint.
        num_blocks: of the model.
        servers: one for each peer.
        share: see `SwarmView`.
    """
    return SwarmView(
        model=model,
        num_blocks=num_blocks,
        share=share,
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


def choose_next_hops(view: SwarmView, end: int, *, own: str, rng: random.Random) -> list[str]:
    """The peers that a session is likely to go on to after a span that ends at a block.

    At most as many as an announcement has room for, by chance, so that all pairs are measured by
    some in a swarm that is larger.
    """
    fitting = [
        server.peer
        for server in view.servers
        if server.is_serving and server.peer != own and server.start <= end < server.end
    ]
    return sorted(rng.sample(fitting, min(len(fitting), MAX_ROUND_TRIPS)))


def directory_key(model: bytes) -> bytes:
    """The key, in Kademlia's space, under which a model's servers announce themselves."""
    return hashlib.sha256(b"/petald/model/" + model).digest()
