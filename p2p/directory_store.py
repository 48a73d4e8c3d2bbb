"""The records that this peer keeps for others.

Pure. Per key, one record for each peer, the newest by sequence number, until it expires. Expiry is
counted from the arrival of a record or of its newest beat, on this peer's own clock, so that a
wrong clock at the author neither prolongs nor shortens it.

Every table has a bound, and a full one is shared fairly between neighbourhoods, which are parts of
the address space (see `p2p.addresses.neighbourhood`): identities cost a flooder nothing, addresses
do. A newcomer takes the place of the latest one of the neighbourhood that has most, unless its own
would then have more. So a flood from one place keeps nobody out, and what it pushes out is itself;
whoever shares a neighbourhood with it keeps the place that he had before. What is not defended is a
flood from as many neighbourhoods as the table has places.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from p2p.beats import is_beat
from p2p.errors import RecordRejected
from p2p.shards import peer_digest
from p2p.wire.directory_messages import MAX_ROWS, Row, SignedRecord

RECORD_BYTES = 1024
"""What a record takes here beside its body, with the tables' entries; measured 0.9 KiB."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds of a store.

    Attributes:
        records_per_key: peers under one key.
        keys_per_peer: under which one peer has a record.
        total_bytes: of all records, each with `RECORD_BYTES` beside its body.
    """

    records_per_key: int = 4096
    keys_per_peer: int = 64
    total_bytes: int = 64 * 1024 * 1024


Place = tuple[bytes, bytes]
"""Where a record is: its key, and the digest of whose it is."""


@dataclass(slots=True)
class _Kept:
    record: SignedRecord
    neighbourhood: str
    arrived_at: float
    number: int
    beat: bytes

    @property
    def size(self) -> int:
        return RECORD_BYTES + len(self.record.body)

    @property
    def expires_at(self) -> float:
        return self.arrived_at + self.record.ttl_s


class _Tally:
    """Places and their sizes by neighbourhood."""

    def __init__(self) -> None:
        self.size = 0
        self._sizes: dict[str, int] = defaultdict(int)
        self._places: dict[str, dict[Place, None]] = defaultdict(dict)

    def add(self, neighbourhood: str, place: Place, size: int) -> None:
        self.size += size
        self._sizes[neighbourhood] += size
        self._places[neighbourhood][place] = None

    def resize(self, neighbourhood: str, grown: int) -> None:
        self.size += grown
        self._sizes[neighbourhood] += grown

    def remove(self, neighbourhood: str, place: Place, size: int) -> None:
        self.size -= size
        self._sizes[neighbourhood] -= size
        del self._places[neighbourhood][place]
        if not self._places[neighbourhood]:
            del self._places[neighbourhood], self._sizes[neighbourhood]

    def find_excess(self, neighbourhood: str, size: int) -> Place | None:
        """Whose place somebody of a neighbourhood may take; nobody's, where it has most itself."""
        if not self._sizes:
            return None
        largest = max(self._sizes, key=self._sizes.__getitem__)
        if self._sizes[largest] <= self._sizes.get(neighbourhood, 0) + size:
            return None
        return next(reversed(self._places[largest]))


class DirectoryStore:
    """Records by key and peer.

    Args:
        limits: bounds of its tables.
        rng: chooses what is listed of a key with more than a list has room for.
    """

    def __init__(
        self, limits: StoreLimits | None = None, *, rng: random.Random | None = None
    ) -> None:
        self._limits = limits or StoreLimits()
        self._rng = rng or random.Random(0)
        self._keys: dict[bytes, dict[bytes, _Kept]] = {}
        self._tallies: dict[bytes, _Tally] = defaultdict(_Tally)
        self._keys_of_peer: dict[bytes, int] = defaultdict(int)
        self._soonest: dict[bytes, float] = {}
        self._all = _Tally()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def total_bytes(self) -> int:
        """What the records take, as `StoreLimits` counts it."""
        return self._all.size

    def put(
        self,
        record: SignedRecord,
        *,
        now: float,
        number: int = 0,
        beat: bytes = b"",
        neighbourhood: str = "",
    ) -> None:
        """Keeps a record whose signature was checked.

        Args:
            record: to keep.
            now: seconds on the own clock.
            number: of its newest beat.
            beat: of that number; nothing for beat 0.
            neighbourhood: from where it came.

        Raises:
            RecordRejected: it is older than what is kept, its beat is none, or there is no room.
        """
        beat = beat or record.beat
        if not is_beat(beat, number, record.beat, 0):
            raise RecordRejected("the beat is not of the record's chain")
        self._expire(record.key, now)
        place = record.key, peer_digest(record.peer)
        known = self._keys.get(record.key, {}).get(place[1])
        if known is not None and record.sequence <= known.record.sequence:
            if record != known.record:
                raise RecordRejected(
                    f"sequence number {record.sequence} is not over {known.record.sequence}"
                )
            if number > known.number:
                known.number, known.beat, known.arrived_at = number, beat, now
            return
        if known is None and self._keys_of_peer.get(place[1], 0) >= self._limits.keys_per_peer:
            raise RecordRejected(
                f"this holder keeps {self._limits.keys_per_peer} records of the peer already"
            )
        kept = _Kept(record, neighbourhood, now, number, beat)
        if known is None:
            self._make_room(place, kept, now)
            self._insert(place, kept)
        else:
            self._replace(place, known, kept, now)

    def put_beat(
        self, key: bytes, peer: str, *, sequence: int, number: int, beat: bytes, now: float
    ) -> None:
        """Prolongs a record by its author's beat.

        Raises:
            RecordRejected: the record is not here, or the beat is not a later one of its chain.
        """
        self._expire(key, now)
        kept = self._keys.get(key, {}).get(peer_digest(peer))
        if kept is None or kept.record.sequence != sequence:
            raise RecordRejected("the record of this beat is not here; put it first")
        if not is_beat(beat, number, kept.beat, kept.number):
            raise RecordRejected("the beat is none of the record's chain, or an old one")
        if number > kept.number:
            kept.number, kept.beat, kept.arrived_at = number, beat, now

    def count(self, key: bytes, *, now: float) -> int:
        """How many records under a key hold now."""
        self._expire(key, now)
        return len(self._keys.get(key, ()))

    def list_rows(self, key: bytes, *, now: float) -> list[Row]:
        """Which records under a key hold now; `MAX_ROWS` of them where there are more.

        Neighbourhoods get places in turns, and in each it goes by chance. So many identities in one
        place leave the others theirs.
        """
        self._expire(key, now)
        found = list(self._keys.get(key, {}).items())
        if len(found) > MAX_ROWS:
            self._rng.shuffle(found)
            ranks: dict[str, int] = defaultdict(int)
            ranked = []
            for one in found:
                ranked.append((ranks[one[1].neighbourhood], one))
                ranks[one[1].neighbourhood] += 1
            ranked.sort(key=lambda each: each[0])
            found = [one for _, one in ranked[:MAX_ROWS]]
        return [
            Row(digest, kept.record.sequence, kept.number, now - kept.arrived_at, kept.beat)
            for digest, kept in found
        ]

    def get(
        self, key: bytes, *, now: float, peers: Iterable[bytes] | None = None
    ) -> tuple[SignedRecord, ...]:
        """The records under a key that hold now; of some peers, by their digests, or of all."""
        self._expire(key, now)
        found = self._keys.get(key, {})
        if peers is None:
            return tuple(kept.record for kept in found.values())
        return tuple(found[peer].record for peer in dict.fromkeys(peers) if peer in found)

    def _make_room(self, place: Place, kept: _Kept, now: float) -> None:
        """Drops what has expired, then what is beyond its neighbourhood's share.

        Raises:
            RecordRejected: there is nothing to drop.
        """
        while len(self._keys.get(place[0], ())) >= self._limits.records_per_key:
            self._drop_excess(self._tallies[place[0]], kept.neighbourhood, 1, place)
        self._make_memory(place, kept.neighbourhood, kept.size, now)

    def _make_memory(self, place: Place, neighbourhood: str, grown: int, now: float) -> None:
        limit = self._limits.total_bytes
        if self._all.size + grown > limit:
            for key in list(self._keys):
                self._expire(key, now)
        while self._all.size + grown > limit:
            self._drop_excess(self._all, neighbourhood, grown, place)

    def _drop_excess(self, tally: _Tally, neighbourhood: str, size: int, newcomer: Place) -> None:
        excess = tally.find_excess(neighbourhood, size)
        if excess is None or excess == newcomer:
            raise RecordRejected("this holder's table is full")
        self._remove(excess)

    def _replace(self, place: Place, known: _Kept, kept: _Kept, now: float) -> None:
        """Puts a peer's newer record where its older one was, which is also its rank."""
        grown = kept.size - known.size
        if grown > 0:
            self._make_memory(place, known.neighbourhood, grown, now)
        kept.neighbourhood = known.neighbourhood  # it moves at the earliest when it is put anew
        self._all.resize(kept.neighbourhood, grown)
        self._keys[place[0]][place[1]] = kept
        self._hasten(place[0], kept.expires_at)

    def _insert(self, place: Place, kept: _Kept) -> None:
        self._keys.setdefault(place[0], {})[place[1]] = kept
        self._tallies[place[0]].add(kept.neighbourhood, place, 1)
        self._all.add(kept.neighbourhood, place, kept.size)
        self._hasten(place[0], kept.expires_at)
        self._keys_of_peer[place[1]] += 1
        self._count += 1

    def _remove(self, place: Place) -> None:
        key, digest = place
        kept = self._keys[key].pop(digest)
        self._tallies[key].remove(kept.neighbourhood, place, 1)
        self._all.remove(kept.neighbourhood, place, kept.size)
        self._count -= 1
        self._keys_of_peer[digest] -= 1
        if not self._keys_of_peer[digest]:
            del self._keys_of_peer[digest]
        if not self._keys[key]:
            del self._keys[key], self._tallies[key]
            self._soonest.pop(key, None)

    def _expire(self, key: bytes, now: float) -> None:
        if now < self._soonest.get(key, 0.0):
            return  # beats only prolong
        expired = [
            digest for digest, kept in self._keys.get(key, {}).items() if kept.expires_at <= now
        ]
        for digest in expired:
            self._remove((key, digest))
        if key in self._keys:
            self._soonest[key] = min(kept.expires_at for kept in self._keys[key].values())

    def _hasten(self, key: bytes, expires_at: float) -> None:
        self._soonest[key] = min(self._soonest.get(key, expires_at), expires_at)
