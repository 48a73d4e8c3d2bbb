"""How the servers of a large model are spread over several keys of the directory.

Pure. At level l a model's key is split into 2**l shards, and a server belongs to the one that the
first l bits of its digest name. Each peer chooses the level by its own estimate of the number of
servers; estimates differ, and the number changes. So a reader reads at one level, and a server
announces at the two that are nearest to its estimate. Invariant: a reader whose estimate is within
a factor of sqrt(2) of a server's finds it; both need to remember nothing. (Where a swarm doubles
within a minute, estimates are out of date by more than that, and some are not seen for so long.)

The first shard of each level has the model's own key, so that there is one place where a peer that
knows nothing yet sees some servers and, by how rare their digests are, how many there must be.

The view of a swarm with more than `SHARDS_READ` shards is a sample: of the shards whose indices
begin as the reader's own does. So all who are in a sample see the same one, and servers that even
out among themselves what they do for each block are even as a whole, as groups that each are even
add up to a swarm that is even. A sample that each reader draws for itself tells what a block's
throughput is to a fifth only, and servers that trust in it mend what nobody else sees: the
least-served block of 3,000 servers then had 0.78 of the mean, where it has 0.97 so
(``benchmarks/swarm_sim.py --views drawn``). Connections to holders stay, and a chain's servers do
not leave the view while they live.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SERVERS_PER_SHARD = 48
"""At least; up to twice as many. With `SHARDS_READ` a sample has 384 servers or more, as many as
even out well among themselves (`benchmarks/swarm_sim.py`); `benchmarks/directory_sim.py` tells what
it costs."""

SHARDS_READ = 8
"""A power of two: that many shards, and fewer, are all read."""

MAX_LEVEL = 14
"""A million servers."""
INDEX_BITS = 32

HYSTERESIS = 0.1
"""In levels. A reader that changes its level reads all records anew. The estimates of two readers
of samples of 384 servers and more differ by a standard deviation of 0.1 levels at most; of the half
level that servers allow for, this leaves four of them."""

FEWEST_COUNTED = 2 / 3
"""Of `SERVERS_PER_SHARD`: so many digests or more under the first shard's key tell how many servers
there are. It has a third more at least, where the estimates of those servers are right."""


SURE_DEVIATIONS = 3.0
"""Where the first shard tells of so many standard deviations more servers than were found, the
level was wrong, not the luck. That is a half more, by two thirds of `SERVERS_PER_SHARD`."""

HOLLOW_LOOKUPS = 16
"""For so long a level is left alone at which the first shard's word was found to be false: some
three minutes. Whoever grinds identities whose digests begin with many zeros can make it so."""


@functools.lru_cache(maxsize=1 << 15)  # views of one swarm ask for the same peers again and again
def peer_digest(peer: str) -> bytes:
    """What stands for a peer in others' announcements: 8 bytes of the SHA-256 of its id."""
    return hashlib.sha256(peer.encode()).digest()[:8]


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a model's servers.

    Attributes:
        level: it is one of 2**level.
        index: the first bits of its servers' digests.
    """

    level: int
    index: int

    def key(self, model_key: bytes) -> bytes:
        """Where it is kept in the directory."""
        if self.index == 0:
            return model_key
        name = b"petald-shard-1" + bytes((self.level,)) + self.index.to_bytes(4) + model_key
        return hashlib.sha256(name).digest()

    def holds(self, digest: bytes) -> bool:
        """Whether a server belongs to it."""
        return shard_index(digest, self.level) == self.index


def shard_index(digest: bytes, level: int) -> int:
    """The shard that a server belongs to, at a level."""
    return int.from_bytes(digest[:4]) >> (INDEX_BITS - level)


def announced_keys(
    model_key: bytes, digest: bytes, servers: float, *, per_shard: float = SERVERS_PER_SHARD
) -> tuple[bytes, ...]:
    """The keys under which a server announces itself: one or two.

    Args:
        model_key: of its model.
        digest: its own.
        servers: how many there are, as far as it knows.
        per_shard: at least, in all but small swarms.
    """
    nearest = min(math.floor(_depth(servers, per_shard) + 0.5), MAX_LEVEL)
    levels = (nearest - 1, nearest) if nearest > 0 else (0,)
    keys = [Shard(level, shard_index(digest, level)).key(model_key) for level in levels]
    return tuple(dict.fromkeys(keys))


def estimate_servers(counts: Sequence[int], level: int) -> float:
    """How many servers there are, by how many each shard that was read has.

    Of a sample a quarter of the shards is left out at either end, since one's holders may all lie.
    Whoever reads all sees the same as the others, and that they agree is what matters.
    """
    cut = len(counts) // 4 if len(counts) < 1 << level else 0
    kept = sorted(counts)[cut : len(counts) - cut]
    return (1 << level) * sum(kept) / len(kept)


def estimate_from_first_shard(
    digests: Iterable[bytes],
    *,
    per_shard: float = SERVERS_PER_SHARD,
    below: int = INDEX_BITS,
) -> float:
    """How many servers there are, by those under the model's own key.

    Those are all whose digests begin with some number of zeros, which follows from themselves.

    Args:
        digests: of those under the key, and any others.
        per_shard: servers, at least.
        below: a level that is known to be empty; digests of so many zeros count for nothing.
    """
    zeros = [INDEX_BITS - int.from_bytes(digest[:4]).bit_length() for digest in digests]
    most = float(len(zeros))
    for level in range(1, min(MAX_LEVEL + 1, below)):
        count = sum(level <= number < below for number in zeros)
        if count < FEWEST_COUNTED * per_shard:
            break
        most = max(most, count * 2.0**level / (1 - 2.0 ** (level - below)))
    return most


class Sample:
    """Which shards one reader reads, as the swarm grows and shrinks.

    Args:
        digest: the reader's own; its own shard is always one of them.
        per_shard: servers, at least.

    Attributes:
        servers: how many there are, as far as is known; none where nothing was read yet.
        level: at which it reads.
    """

    def __init__(self, digest: bytes, *, per_shard: float = SERVERS_PER_SHARD) -> None:
        self.servers: float | None = None
        self.level = 0
        self._per_shard = per_shard
        self._digest = digest
        self._is_guess = False
        self._hollow, self._hollow_for = INDEX_BITS, 0

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Those that it reads now."""
        if 2**self.level <= SHARDS_READ:
            return self.all_shards
        own = shard_index(self._digest, self.level)
        return tuple(Shard(self.level, own ^ number) for number in range(SHARDS_READ))

    @property
    def all_shards(self) -> tuple[Shard, ...]:
        """Those that there are."""
        return tuple(Shard(self.level, index) for index in range(2**self.level))

    @property
    def share(self) -> float:
        """The part of all servers that is in the sample."""
        return min(1.0, SHARDS_READ / (1 << self.level))

    def begin(self, *, is_anything_known: bool) -> None:
        """A lookup begins; without anything that is known it begins anew, at the model's key."""
        self._hollow_for -= 1
        if self._hollow_for <= 0:
            self._hollow = INDEX_BITS
        if not is_anything_known:
            self.servers, self.level, self._is_guess = None, 0, False

    def on_read(self, digests: Iterable[bytes]) -> bool:
        """Takes the servers that were found in the shards of now; says whether those stay.

        Where it says no, there are other shards to be read. The first shard is asked for the number
        of servers where a level has far fewer than it should, which was too high or too low then,
        and at the lowest levels, where what it has itself may look like the whole.
        """
        found, before, was_guess = list(digests), self.level, self._is_guess
        is_first, self._is_guess = self.servers is None, False
        self.servers = self._count(found)
        depth = _depth(self.servers, self._per_shard)
        is_collapse = depth < before - 1
        if was_guess and depth < before - HYSTERESIS:
            self._hollow, self._hollow_for = before, HOLLOW_LOOKUPS
        if 1 << before < SHARDS_READ or is_collapse:
            guess = estimate_from_first_shard(found, per_shard=self._per_shard, below=self._hollow)
            luck = SURE_DEVIATIONS / math.sqrt(FEWEST_COUNTED * self._per_shard)
            if guess > self.servers * (1.0 if is_first else 1.0 + luck):
                self.servers, self._is_guess = guess, True
                depth = min(_depth(guess, self._per_shard), self._hollow - 1)
        if before - HYSTERESIS <= depth < before + 1 + HYSTERESIS and not is_first:
            return True
        self.level = max(0, min(math.floor(depth), MAX_LEVEL))
        if before == self.level == 0:
            self.servers = float(len(found))
        return before == self.level

    def _count(self, found: Sequence[bytes]) -> float:
        """How many servers there are, by those in the shards of now."""
        if self.level == 0:
            return float(len(found))
        counts = dict.fromkeys((shard.index for shard in self.shards), 0)
        for digest in found:
            index = shard_index(digest, self.level)
            if index in counts:
                counts[index] += 1
        return estimate_servers(list(counts.values()), self.level)

    def keys(self, model_key: bytes, digest: bytes) -> tuple[bytes, ...]:
        """Under which keys a server announces itself by what was read here."""
        return announced_keys(model_key, digest, self.servers or 0.0, per_shard=self._per_shard)


def _depth(servers: float, per_shard: float) -> float:
    """The level at which a shard would have so many servers, as a fraction."""
    return math.log2(max(servers, 1.0) / per_shard)
