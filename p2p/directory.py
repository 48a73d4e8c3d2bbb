"""The directory: records put to, and read from, the peers nearest to a model's keys.

A holder takes a record only from the peer whose it is, which its connection has proven, so nobody
can put again what somebody else once said. Readers check signatures and beats, since holders may
lie, and ask several, since they may withhold. What is decided stands in pure modules: `p2p.shards`
(under which keys), `p2p.directory_author` (what to say), `p2p.model_memory` and `p2p.holder_choice`
(what and whom to ask), `p2p.directory_memory` (what to believe), `p2p.directory_store` (what to
keep for others). Here it is carried out. Invariant: reading a key ends within its deadline, whoever
hangs.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from p2p.directory_author import Author, OwnRecord
from p2p.directory_holder import MAX_FRAME_BYTES, DirectoryHolder, SignatureChecks
from p2p.directory_memory import KeyMemory, Known
from p2p.directory_store import DirectoryStore
from p2p.errors import P2PError, Refused, RemoteProtocolError
from p2p.holder_choice import HOLDERS, HolderBook
from p2p.model_memory import SHARD_AGE_S, KeyRead, ModelMemory
from p2p.network import Network
from p2p.rpc import MessageStream, call
from p2p.shards import SERVERS_PER_SHARD, Sample, Shard, peer_digest
from p2p.wire.directory_messages import (
    DIRECTORY_PROTOCOL,
    GetRecords,
    ListRecords,
    PutRecord,
    RecordList,
    Records,
    SignedRecord,
    decode_rows,
)
from p2p.wire.message import Message, expect
from p2p.wire.replies import Ok

CALL_DEADLINE_S = 5.0
SHARD_DEADLINE_S = 2.0
"""For a holder of a shard to answer, before another is asked: a dial and two questions on ways of
some 150 ms."""

LOOKUP_DEADLINE_S = 6.0
"""For reading one key, and so for a lookup in a small swarm."""

GRACE_S = 1.0
"""For the slower holders, once one has answered with records."""

MAX_ROUNDS = 4
"""Of one lookup, each at another level than the one before."""

KEYS_AT_ONCE = 16
HOLDERS_AGE_S = 120.0
"""For how long it is remembered who holds a shard. A peer that came nearer since has its records
from the announcements of those who looked later, and is one of eight."""

SIZE_AGE_S = 60.0
"""An author that has not read for so long reads, to know under which keys to announce itself."""

OWN_PART = "own"
"""A neighbourhood of one, so that the own record is never pushed out."""

MAX_MODELS = 256
MAX_KEYS = 65_536


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a lookup found.

    Attributes:
        records: of each server the newest.
        share: the part of all servers that these are about; 1 while all is read.
    """

    records: tuple[Known, ...]
    share: float = 1.0


class _Model:
    """One model's part of the directory, as this peer knows it."""

    def __init__(self, memory: ModelMemory, author: Author) -> None:
        self.memory = memory
        self.author = author
        self.looked_at: float | None = None
        self.sample_turn = _Turn()
        self.whole_turn = _Turn()
        self.key_locks: dict[bytes, trio.Lock] = defaultdict(trio.Lock)


class _Turn:
    """Lookups of one kind, one after another; whoever waited may take what the one before found."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.began_at = -math.inf
        """Of the last one that was not cancelled."""


class _Reading:
    """A key that is being read."""

    def __init__(
        self, memory: KeyMemory, read: KeyRead, scope: trio.CancelScope, *, is_shard: bool
    ) -> None:
        self.memory = memory
        self.read = read
        self.scope = scope
        self.is_shard = is_shard
        self.released = trio.Event()

    def wake(self) -> None:
        """Lets others fetch what a holder has not given."""
        self.released.set()
        self.released = trio.Event()


class Directory:
    """Puts and reads records, and keeps those of others.

    Args:
        network: the way to the other holders; the protocol's handler is set on it.
        store: what this peer keeps.
        clock: seconds on this peer's own clock, which never goes back.
        wall_clock: seconds since the epoch.
        rng: chooses holders.
        per_shard: servers of one model under one key, at least, once there are more.
    """

    def __init__(
        self,
        network: Network,
        *,
        store: DirectoryStore | None = None,
        clock: Callable[[], float] = trio.current_time,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        per_shard: float = SERVERS_PER_SHARD,
    ) -> None:
        self._network = network
        self._rng = rng or random.Random(os.urandom(16))
        self._store = store or DirectoryStore(rng=self._rng)
        self._clock = clock
        self._wall_clock = wall_clock
        self._per_shard = per_shard
        self._digest = peer_digest(network.peer)
        self._models: dict[bytes, _Model] = {}
        self._book = HolderBook()
        self._holders: dict[bytes, tuple[float, tuple[str, ...]]] = {}
        self._checks = SignatureChecks(network.verify)
        self._holder = DirectoryHolder(network, self._store, self._checks, clock)
        network.set_handler(DIRECTORY_PROTOCOL, self._holder.serve)

    async def publish(self, key: bytes, body: bytes, *, ttl_s: float, sequence: int) -> int:
        """Puts the own record under a model's keys, to the nearest peers of each.

        Where the body is what it was before, holders that have the record are told only that it
        still holds.

        Args:
            key: the model's, 32 bytes.
            body: at most `MAX_BODY_BYTES`.
            ttl_s: at most `MAX_TTL_S`.
            sequence: higher than that of the record before it.

        Returns:
            How many holders took it, the own peer among them, where fewest did.
        """
        model = self._model(key)
        if model.looked_at is None:
            await self.lookup(key)
        keys = model.memory.sample.keys(key, self._digest)
        model.author.forget_all_but(keys)
        taken = dict.fromkeys(keys, 0)

        async def put(own: OwnRecord, holder: str) -> None:
            if await self._put(own, holder):
                taken[own.record.key] += 1

        async def put_all(each: bytes) -> None:
            own = model.author.say(
                each, body, ttl_s=ttl_s, sequence=sequence, wall_now=self._wall_clock()
            )
            async with trio.open_nursery() as nursery:
                for holder in await self._find_holders(each, is_shard=len(keys) > 1):
                    nursery.start_soon(put, own, holder)

        async with trio.open_nursery() as nursery:
            for each in keys:
                nursery.start_soon(put_all, each)
        if model.looked_at is None or self._clock() - model.looked_at > SIZE_AGE_S:
            await self.lookup(key)
        return min(taken.values())

    async def lookup(
        self, key: bytes, *, whole: bool = False, max_age_s: float = SHARD_AGE_S
    ) -> Lookup:
        """Reads the records of a model: all of them, or in a large swarm a sample.

        Args:
            key: the model's.
            whole: read all, however many there are.
            max_age_s: of what was read before of a large swarm, and will do; in a small one, and
                where it is to be whole, all is read.
        """
        model = self._model(key)
        sample = model.memory.sample
        since = self._clock()
        read_sample = partial(self._read_sample, model, max_age_s)
        await self._take_turn(model.sample_turn, read_sample, since - max_age_s)
        shards, share = sample.shards, sample.share
        if whole and share < 1:
            shards, share = sample.all_shards, 1.0
            read_all = partial(self._read_shards, model, shards, since)
            await self._take_turn(model.whole_turn, read_all, since - max_age_s)
        return Lookup(model.memory.find(shards, self._clock()), share)

    # Writing.

    async def _put(self, own: OwnRecord, holder: str) -> bool:
        """Tells a holder of the own record; says whether it took it."""
        try:
            if holder == self._network.peer:
                self._holder.keep(own.whole, holder, OWN_PART)
                return True
            with trio.fail_after(CALL_DEADLINE_S):
                message = own.message_for(holder)
                try:
                    await call(self._network, holder, DIRECTORY_PROTOCOL, message, Ok)
                except Refused:
                    own.holders.discard(holder)
                    if isinstance(message, PutRecord):
                        raise
                    await call(self._network, holder, DIRECTORY_PROTOCOL, own.whole, Ok)
                own.holders.add(holder)
        except (P2PError, trio.TooSlowError):
            return False  # this is why there are several holders
        return True

    # Reading.

    async def _take_turn(
        self, turn: _Turn, read: Callable[[], Awaitable[None]], since: float
    ) -> None:
        """Reads, but for what was read while this one waited, in a lookup that began since."""
        is_waiting = turn.lock.locked()
        async with turn.lock:
            if is_waiting and turn.began_at > since:
                return
            began_at = self._clock()
            await read()
            turn.began_at = began_at

    async def _read_sample(self, model: _Model, max_age_s: float) -> None:
        since = self._clock()
        model.memory.begin_lookup(since)
        for _ in range(MAX_ROUNDS):
            await self._read_shards(model, model.memory.due(self._clock(), max_age_s), since)
            model.looked_at = self._clock()
            if model.memory.finish(self._clock()):
                break

    async def _read_shards(self, model: _Model, shards: Sequence[Shard], since: float) -> None:
        """Reads some shards of one level, but those that others have read since."""
        limiter = trio.CapacityLimiter(KEYS_AT_ONCE)
        expected = model.memory.expect(shards, self._clock())

        async def read(shard: Shard, key: bytes) -> None:
            async with limiter, model.key_locks[key]:
                if not model.memory.is_read_since(shard, since):
                    memory = model.memory.begin_one(shard, expected[shard.index], self._clock())
                    await self._read_key(memory, is_shard=shard.level > 0)

        async with trio.open_nursery() as nursery:
            for shard in shards:
                nursery.start_soon(read, shard, shard.key(model.memory.key))

    async def _read_key(self, memory: KeyMemory, *, is_shard: bool) -> None:
        with trio.move_on_after(LOOKUP_DEADLINE_S) as scope:
            read = KeyRead(
                memory,
                self._book,
                await self._find_holders(memory.key, is_shard=is_shard),
                rng=self._rng,
                is_shard=is_shard,
                now=self._clock(),
            )
            reading = _Reading(memory, read, scope, is_shard=is_shard)
            try:
                while wave := read.next_wave(self._clock()):
                    async with trio.open_nursery() as nursery:
                        for holder in wave:
                            nursery.start_soon(self._ask, reading, holder, nursery.cancel_scope)
            finally:
                read.finish(self._clock())

    async def _ask(self, reading: _Reading, holder: str, wave: trio.CancelScope) -> None:
        memory = reading.memory
        try:
            if holder == self._network.peer:
                self._read_own(memory)
            else:
                with trio.fail_after(SHARD_DEADLINE_S if reading.is_shard else CALL_DEADLINE_S):
                    await self._read_from(reading, holder)
        except (P2PError, trio.TooSlowError):
            memory.silent.add(holder)  # this is why several are asked
        reading.read.on_end(holder)
        if reading.is_shard:
            if memory.is_enough(self._clock()):
                wave.cancel()
        elif memory.living(self._clock()):
            # The others have had the same time, and one of them may hang.
            scope = reading.scope
            scope.deadline = min(scope.deadline, trio.current_time() + GRACE_S)

    def _read_own(self, memory: KeyMemory) -> None:
        now, wall_now, own = self._clock(), self._wall_clock(), self._network.peer
        rows = self._store.list_rows(memory.key, now=now)
        memory.on_list(own, rows, now=now, wall_now=wall_now)
        while claimed := memory.claim(own, now):
            records = self._store.get(memory.key, now=now, peers=claimed)
            memory.on_records(own, claimed, records, now=now, wall_now=wall_now)

    async def _read_from(self, reading: _Reading, holder: str) -> None:
        memory = reading.memory
        stream = await self._network.open_stream(holder, DIRECTORY_PROTOCOL)
        async with MessageStream(stream, max_frame_bytes=MAX_FRAME_BYTES) as messages:
            await messages.send(ListRecords(key=memory.key))
            rows = decode_rows(expect(await _receive(messages), RecordList).rows)
            memory.on_list(holder, rows, now=self._clock(), wall_now=self._wall_clock())
            while True:
                now = self._clock()
                claimed = memory.claim(holder, now)
                if claimed:
                    await self._fetch(messages, reading, holder, claimed)
                    continue
                until = memory.waits_until(holder)
                if until is None:
                    return
                with trio.move_on_after(until - now):
                    await reading.released.wait()

    async def _fetch(
        self, messages: MessageStream, reading: _Reading, holder: str, claimed: tuple[bytes, ...]
    ) -> None:
        memory = reading.memory
        records: tuple[SignedRecord, ...] | None = None
        try:
            await messages.send(GetRecords(key=memory.key, peers=claimed))
            records = expect(await _receive(messages), Records).records
        finally:  # also where it was cancelled
            now = self._clock()
            if records is None:
                memory.release(holder, claimed, now)
            else:
                memory.on_records(holder, claimed, records, now=now, wall_now=self._wall_clock())
            reading.wake()

    def _model(self, key: bytes) -> _Model:
        model = self._models.get(key)
        if model is None:
            if len(self._models) >= MAX_MODELS:
                del self._models[next(iter(self._models))]
            sample = Sample(self._digest, per_shard=self._per_shard)
            model = self._models[key] = _Model(
                ModelMemory(key, sample, is_signed=self._checks.is_signed),
                Author(self._network.peer, sign=self._network.sign, make_secret=os.urandom),
            )
        return model

    async def _find_holders(self, key: bytes, *, is_shard: bool) -> tuple[str, ...]:
        """The peers nearest to a key; of a shard's, those that were so a while ago will do."""
        known = self._holders.get(key)
        if is_shard and known is not None and self._clock() - known[0] <= HOLDERS_AGE_S:
            return known[1]
        found = await self._network.find_closest_peers(key, HOLDERS)
        holders = tuple(peer.peer for peer in found)
        if len(holders) == HOLDERS:
            if len(self._holders) >= MAX_KEYS:
                self._holders.clear()
            self._holders[key] = self._clock(), holders
        return holders


async def _receive(messages: MessageStream) -> Message:
    """The next message of a conversation that is not over.

    Raises:
        RemoteProtocolError: the other end ended it.
    """
    reply = await messages.receive()
    if reply is None:
        raise RemoteProtocolError(f"{messages.remote_peer} ended the stream without an answer")
    return reply
