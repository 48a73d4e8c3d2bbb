"""What a reader knows of one model's part of the directory: the sample, and each key of it.

Pure. Invariant: what is known under keys of a level that was left counts on until it expires, so
that no server is forgotten because the swarm grew or shrank.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from p2p.directory_memory import KeyMemory, Known
from p2p.holder_choice import HolderBook, Standing, asked_at_once
from p2p.shards import Sample, Shard, shard_index
from p2p.wire.directory_messages import MAX_TTL_S, SignedRecord

SHARD_AGE_S = 15.0
"""The time between two announcements of a server."""


class KeyRead:
    """One read of one key: whom to ask next, and when it is over.

    Args:
        memory: of the key; the read begins here.
        book: who did badly lately.
        holders: of the key.
        rng: in which order they are asked.
        is_shard: whether the key is one of several of its model.
        now: seconds on the own clock.
    """

    def __init__(
        self,
        memory: KeyMemory,
        book: HolderBook,
        holders: Sequence[str],
        *,
        rng: random.Random,
        is_shard: bool,
        now: float,
    ) -> None:
        self._memory = memory
        self._book = book
        self._is_shard = is_shard
        self._queue = book.order(holders, now, rng=rng)
        self._trusted = sum(book.standing(one, now) < Standing.SILENT for one in holders)
        self._asked: list[str] = []
        self._ended: set[str] = set()

    def next_wave(self, now: float) -> list[str]:
        """The holders to ask now, all at once; nobody where the read is over."""
        if self._memory.is_enough(now):
            return []
        count = asked_at_once(
            is_first=not self._asked,
            is_cold=self._memory.is_cold,
            is_shard=self._is_shard,
            trusted=self._trusted,
        )
        wave, self._queue = self._queue[:count], self._queue[count:]
        self._asked += wave
        if not self._queue:
            self._memory.on_all_asked(now)
        return wave

    def on_end(self, holder: str) -> None:
        """A holder has answered, or failed to; others may have been given up for what it said."""
        self._ended.add(holder)

    def finish(self, now: float) -> None:
        """The read is over: remembers how the holders did."""
        self._memory.finish(now)
        lacking = set(self._memory.find_bad(self._ended, now))
        for holder in self._ended | self._memory.silent:
            standing = Standing.LACKING if holder in lacking else Standing.GOOD
            if holder in self._memory.silent:
                standing = Standing.SILENT
            if holder in self._memory.liars:
                standing = Standing.LIAR
            self._book.note(holder, standing, now)


class ModelMemory:
    """What is known of one model.

    Args:
        key: the model's.
        sample: which shards are read.
        is_signed: whether a record's signature is its peer's.

    Attributes:
        key: as given.
        sample: as given.
    """

    def __init__(
        self, key: bytes, sample: Sample, *, is_signed: Callable[[SignedRecord], bool]
    ) -> None:
        self.sample = sample
        self.key = key
        self._is_signed = is_signed
        self._memories: dict[bytes, KeyMemory] = {}
        self._begun_at: dict[bytes, float] = {}

    def begin_lookup(self, now: float) -> None:
        """A lookup begins, of one or several rounds."""
        self.sample.begin(is_anything_known=bool(self.living(now)))

    def due(self, now: float, max_age_s: float = SHARD_AGE_S) -> tuple[Shard, ...]:
        """Which shards of the sample to read now, where what is so old is too old.

        Where that is all that there is, all of it. Of a larger swarm those that were not read just
        before: hardly a server has said anything since.
        """
        shards = self.sample.shards
        if self.sample.share == 1:
            return shards
        age_s = min(SHARD_AGE_S, max_age_s)
        return tuple(shard for shard in shards if now - self._read_at(shard) >= age_s)

    def _read_at(self, shard: Shard) -> float:
        memory = self._memories.get(shard.key(self.key))
        return -math.inf if memory is None or memory.read_at is None else memory.read_at

    def begin(self, shards: Sequence[Shard], now: float) -> list[KeyMemory]:
        """Begins to read some shards of one level; gives the memory of each."""
        expected = self.expect(shards, now)
        return [self.begin_one(shard, expected[shard.index], now) for shard in shards]

    def expect(self, shards: Sequence[Shard], now: float) -> dict[int, dict[bytes, float]]:
        """Until when each server lives that is to be found in one of some shards of one level."""
        expected: dict[int, dict[bytes, float]] = {shard.index: {} for shard in shards}
        for digest, one in self.living(now).items() if shards else ():
            index = shard_index(digest, shards[0].level)
            if index in expected:
                expected[index][digest] = one.expires_at
        return expected

    def begin_one(self, shard: Shard, expected: Mapping[bytes, float], now: float) -> KeyMemory:
        """Begins to read a shard; no other read of it may be under way."""
        key = shard.key(self.key)
        memory = self._memories.get(key)
        if memory is None:
            holds = shard.holds if shard.index else None  # the model's key is many shards'
            memory = KeyMemory(key, is_signed=self._is_signed, holds=holds)
            self._memories[key] = memory
        memory.begin(now, expected)
        self._begun_at[key] = now
        return memory

    def is_read_since(self, shard: Shard, at: float) -> bool:
        """Whether a read of a shard that began later has ended well."""
        begun_at = self._begun_at.get(shard.key(self.key), -math.inf)
        return at < begun_at <= self._read_at(shard)

    def finish(self, now: float) -> bool:
        """The sample's shards were read; says whether those are the ones to read."""
        return self.sample.on_read(self.living(now))

    def find(self, shards: Sequence[Shard], now: float) -> tuple[Known, ...]:
        """The servers of some shards; forgets keys that were not read since all in them expired."""
        level, indices = shards[0].level, {shard.index for shard in shards}
        living = self.living(now)
        for key in [key for key, at in self._begun_at.items() if now - at > MAX_TTL_S]:
            del self._begun_at[key], self._memories[key]
        return tuple(one for digest, one in living.items() if shard_index(digest, level) in indices)

    def living(self, now: float) -> dict[bytes, Known]:
        """Of each server, by its digest, what it told last under whichever key."""
        found: dict[bytes, Known] = {}
        for memory in self._memories.values():
            for digest, one in memory.living(now).items():
                known = found.get(digest)
                if known is None or one.version > known.version:
                    found[digest] = one
        return found
