"""A simulated directory: servers, holders and readers of one model on an event heap.

The deciders are the daemon's own: authors, stores, samples, memories, and the choice of holders.
What is not: streams are instant and counted by the bytes of their messages, signatures are a
constant, and Kademlia finds the nearest peers at no cost.

All servers announce themselves to real stores. All ask holders for their lists; but only some of
them, the readers, keep what they read: 10,000 memories of 600 records each would take hours and
gigabytes. The others ask one holder of each shard, as a reader does that remembers, and fetch of
what it lists the part that readers fetched on average.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.directory_sim_sizes import KEY, SIGNATURE, STREAM_BYTES, Sizes, make_announcement
from p2p.directory_author import Author, OwnRecord
from p2p.directory_memory import KeyMemory
from p2p.directory_store import DirectoryStore
from p2p.errors import RecordRejected
from p2p.holder_choice import HOLDERS, HolderBook
from p2p.model_memory import KeyRead, ModelMemory
from p2p.shards import Sample, peer_digest
from p2p.wire.directory_messages import (
    MAX_ROWS,
    PutBeat,
    Row,
)
from petald.announcer import PERIOD_S, RENEW_S, TTL_S
from petald.move_planner import look_period_s, next_look_s

NEW_S = 30.0
"""After its first announcement readers may lack a server for two or three looks."""

DOUBLING_S = 120.0
READERS = 100

CHANGE_S = RENEW_S
"""An announcement is told anew after so long at the latest, and at a move, a claim and a larger
change of the load; how often those are is an assumption."""

TRUTHFUL = "none"
STALE = "lie"
WITHHOLD = "withhold"
FLOOD = "flood"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is simulated.

    Attributes:
        servers: of one model.
        hostile: what the hostile holders do.
        hostile_share: of all peers.
        change_s: mean time until a server's announcement says something else.
        readers: servers whose memory is simulated.
        crashes: servers that die at `crash_s`.
        begin_s: from here on is counted; by then views are read and old records expired.
        end_s: of the simulation.
        grows_from: servers there are at first; the others join, so that their number doubles every
            `DOUBLING_S`, and leave as they came. Nobody crashes then. None: all are there at once.
    """

    servers: int
    hostile: str = TRUTHFUL
    hostile_share: float = 0.2
    change_s: float = CHANGE_S
    readers: int = READERS
    crashes: int = 20
    begin_s: float = 60.0
    crash_s: float = 90.0
    end_s: float = 210.0
    grows_from: int | None = None
    seed: int = 0


@dataclass(slots=True)
class Traffic:
    """Bytes of one server, sent and received, and its calls, since counting began."""

    bytes: float = 0.0
    writes: int = 0
    reads: int = 0


@dataclass(slots=True, eq=False)
class Server:
    """One peer: author, holder, and asker."""

    peer: str
    author: Author
    body: bytes
    digest: bytes
    is_hostile: bool = False
    is_alive: bool = True
    has_left: bool = False
    told_at: float | None = None
    traffic: Traffic = field(default_factory=Traffic)
    store: DirectoryStore | None = None
    frozen: dict[bytes, list[Row]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Reader:
    """One server's memory."""

    server: Server
    memory: ModelMemory
    book: HolderBook = field(default_factory=HolderBook)
    seen: set[str] = field(default_factory=set)
    lost_s: dict[str, float] = field(default_factory=dict)


class World:
    """The swarm and its time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now = 0.0
        self.rng = random.Random(settings.seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._events = 0
        self._holders: dict[bytes, list[Server]] = {}
        self.servers = [self._make_server(number) for number in range(settings.servers)]
        self._positions = np.array(
            [
                int.from_bytes(hashlib.sha256(server.peer.encode()).digest()[8:16])
                for server in self.servers
            ],
            np.uint64,
        )
        for server in self.rng.sample(
            self.servers, round(settings.hostile_share * len(self.servers))
        ):
            server.is_hostile = settings.hostile != TRUTHFUL
        chosen = self.rng.sample(self.servers, min(settings.readers, len(self.servers)))
        self.readers = [self._make_reader(server) for server in chosen]
        self._places = {server.peer: place for place, server in enumerate(chosen)}
        watched = set(chosen)
        self._others = [server for server in self.servers if server not in watched]
        for server in self._others:
            self._places[server.peer] = len(self._places)
        self.crashed_at: dict[str, float] = {}
        self.unseen = Counter[str]()
        self.deepest = 0
        self._fetched = Counter[str]()
        self._due = 1.0
        self.sizes = Sizes(self.servers[0].body)

    def _make_server(self, number: int) -> Server:
        peer = f"12D3KooW{number:044}"
        return Server(
            peer=peer,
            author=Author(peer, sign=lambda _: SIGNATURE, make_secret=self.rng.randbytes),
            body=make_announcement(number, self.rng),
            digest=peer_digest(peer),
        )

    def _make_reader(self, server: Server) -> Reader:
        sample = Sample(server.digest)
        memory = ModelMemory(KEY, sample, is_signed=lambda one: one.signature == SIGNATURE)
        return Reader(server, memory)

    # Time.

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._events += 1
        heapq.heappush(self._heap, (when, self._events, what))

    def run(self) -> None:
        for server in self.servers:
            self.at(self.joins_at(server), lambda server=server: self.announce(server))
        for reader in self.readers:
            self.at(
                PERIOD_S + self.rng.uniform(0, look_period_s(0)),
                lambda reader=reader: self.look(reader),
            )
        for server in self._others:
            self.at(
                self.joins_at(server) + PERIOD_S + self.rng.uniform(0, look_period_s(0)),
                lambda server=server: self.look_lightly(server),
            )
        if self.settings.grows_from is None:
            self.at(self.settings.crash_s, self.crash)
        else:
            for server in self._others:
                self.at(
                    self.settings.end_s - self.joins_at(server),
                    lambda server=server: self.leave(server),
                )
        self.at(self.settings.begin_s / 2, self.freeze)
        while self._heap and self._heap[0][0] <= self.settings.end_s:
            self.now, _, what = heapq.heappop(self._heap)
            what()

    def joins_at(self, server: Server) -> float:
        """When a server comes: all at once, or as the swarm grows."""
        first, place = self.settings.grows_from, self._places[server.peer]
        if first is None or place < first:
            return self.rng.uniform(0, PERIOD_S)
        return self.settings.begin_s + DOUBLING_S * math.log2((place + 1) / first)

    def leave(self, server: Server) -> None:
        """It leaves the swarm, not the network: it goes on to hold."""
        server.told_at = None
        server.has_left = True

    def crash(self) -> None:
        watching = {reader.server.peer for reader in self.readers}
        able = [server for server in self.servers if server.peer not in watching] or self.servers
        for server in self.rng.sample(able, min(self.settings.crashes, len(able))):
            server.is_alive = False
            self.crashed_at[server.peer] = self.now

    def freeze(self) -> None:
        """From now on liars tell what was true now, and keep half of it to themselves."""
        if self.settings.hostile != STALE:
            return
        for server in self.servers:
            if server.is_hostile and server.store is not None:
                for key, holders in self._holders.items():
                    if server in holders:
                        rows = server.store.list_rows(key, now=self.now)
                        server.frozen[key] = [row for row in rows if row.peer[0] % 2]

    # Writing.

    def holders_of(self, key: bytes) -> list[Server]:
        found = self._holders.get(key)
        if found is None:
            distances = self._positions ^ np.uint64(int.from_bytes(key[8:16]))
            count = min(HOLDERS, len(self.servers))
            nearest = np.argpartition(distances, count - 1)[:count]
            found = self._holders[key] = [self.servers[number] for number in nearest]
            for server in found:
                server.store = server.store or DirectoryStore(rng=self.rng)
        return found

    def announce(self, server: Server) -> None:
        if not server.is_alive or server.has_left:
            return
        server.told_at = self.now if server.told_at is None else server.told_at
        period_s = PERIOD_S * self.rng.uniform(0.8, 1.2)
        if self.rng.random() < period_s / self.settings.change_s:
            server.body = make_announcement(self.rng.getrandbits(40), self.rng)
        keys = self.sample_of(server).keys(KEY, server.digest)
        server.author.forget_all_but(keys)
        for key in keys:
            own = server.author.say(
                key,
                server.body,
                ttl_s=TTL_S,
                sequence=int((1e9 + self.now) * 1e3),
                wall_now=1e9 + self.now,
            )
            for holder in self.holders_of(key):
                self.put(server, own, holder)
        self.at(self.now + period_s, lambda: self.announce(server))

    def put(self, server: Server, own: OwnRecord, holder: Server) -> None:
        message = own.message_for(holder.peer)
        sent = self.sizes.beat if isinstance(message, PutBeat) else self.sizes.put
        self.count(server, holder, sent, self.sizes.ok if holder.is_alive else 0)
        server.traffic.writes += self.is_counting
        if not holder.is_alive:
            return
        own.holders.add(holder.peer)
        if holder.is_hostile and holder.frozen:
            return
        assert holder.store is not None
        try:
            if isinstance(message, PutBeat):
                holder.store.put_beat(
                    message.key,
                    server.peer,
                    sequence=message.sequence,
                    number=message.number,
                    beat=message.beat,
                    now=self.now,
                )
            else:
                holder.store.put(
                    message.record,
                    now=self.now,
                    number=message.number,
                    beat=message.beat,
                    neighbourhood=server.peer,
                )
        except RecordRejected:
            own.holders.discard(holder.peer)

    @property
    def is_counting(self) -> bool:
        return self.now >= self.settings.begin_s

    def count(self, asker: Server, holder: Server, asked: float, answered: float) -> None:
        """Counts a call; the own peer is asked for nothing."""
        if self.is_counting and asker is not holder:
            size = asked + answered + (2 * STREAM_BYTES if answered else STREAM_BYTES)
            asker.traffic.bytes += size
            holder.traffic.bytes += size

    # Reading.

    def sample_of(self, server: Server) -> Sample:
        """What a server knows of the swarm's size: what one of the readers does, as of now."""
        sample = self.rng.choice(self.readers).memory.sample
        if sample.servers is None:
            sample = Sample(server.digest)
            sample.servers = float(self.settings.grows_from or len(self.servers))
        return sample

    def look(self, reader: Reader) -> None:
        if not reader.server.is_alive:
            return
        memory = reader.memory
        memory.begin_lookup(self.now)
        for _ in range(4):
            due = memory.due(self.now, max_age_s=0.0)  # as the mover of a server reads
            self._due += 0.01 * (len(due) / len(memory.sample.shards) - self._due)
            for key_memory in memory.begin(due, self.now):
                self.read_key(reader, key_memory)
            if memory.finish(self.now):
                break
        found = {one.peer for one in memory.find(memory.sample.shards, self.now)}
        self.note_view(reader, found)
        self.at_next_look(len(found), lambda: self.look(reader))

    def at_next_look(self, seen: int, look: Callable[[], None]) -> None:
        self.at(self.now + next_look_s(seen, self.rng), look)  # the most frequent reading there is

    def note_view(self, reader: Reader, found: set[str]) -> None:
        for peer, crashed_at in self.crashed_at.items():
            if peer in reader.seen and peer not in found:
                reader.lost_s[peer] = self.now - crashed_at
        reader.seen = found
        self.deepest = max(self.deepest, reader.memory.sample.level)
        if self.is_counting:
            shards = reader.memory.sample.shards
            level, indices = shards[0].level, {shard.index for shard in shards}
            for server in self.servers:
                index = int.from_bytes(server.digest[:4]) >> (32 - level)
                told_at = server.told_at
                is_there = server.is_alive and told_at is not None
                if is_there and self.now - told_at > NEW_S and index in indices:
                    self.unseen["all"] += 1
                    self.unseen["unseen"] += server.peer not in found

    def read_key(self, reader: Reader, memory: KeyMemory) -> None:
        holders = {holder.peer: holder for holder in self.holders_of(memory.key)}
        read = KeyRead(
            memory,
            reader.book,
            list(holders),
            rng=self.rng,
            is_shard=reader.memory.sample.level > 0,
            now=self.now,
        )
        while wave := read.next_wave(self.now):
            for peer in wave:
                self.ask(reader, memory, holders[peer])
                read.on_end(peer)
        read.finish(self.now)

    def ask(self, reader: Reader, memory: KeyMemory, holder: Server) -> None:
        server = reader.server
        server.traffic.reads += self.is_counting and server is not holder
        rows = self.rows_of(holder, memory.key)
        if rows is None:
            self.count(server, holder, self.sizes.list_request, 0)
            return
        self.count(server, holder, self.sizes.list_request, self.sizes.list_of(len(rows)))
        memory.on_list(holder.peer, rows, now=self.now, wall_now=1e9 + self.now)
        is_usual = self.is_counting and not holder.is_hostile
        if is_usual:
            self._fetched["listed"] += len(rows)
        while claimed := memory.claim(holder.peer, self.now):
            given = self.give(holder, memory.key, claimed)
            if is_usual:
                self._fetched["fetched"] += len(claimed)
            self.count(server, holder, self.sizes.get(len(claimed)), self.sizes.records(len(given)))
            memory.on_records(holder.peer, claimed, given, now=self.now, wall_now=1e9 + self.now)

    def rows_of(self, holder: Server, key: bytes) -> list[Row] | None:
        """What a holder lists; None where it does not answer."""
        if not holder.is_alive:
            return None
        if holder.is_hostile:
            if self.settings.hostile == WITHHOLD:
                return [] if holder.digest[0] % 2 else None
            if self.settings.hostile == FLOOD:
                return [
                    Row(self.rng.randbytes(8), 2**40, 0, 0.0, bytes(16)) for _ in range(MAX_ROWS)
                ]
            if key in holder.frozen:
                return holder.frozen[key]
        assert holder.store is not None
        return holder.store.list_rows(key, now=self.now)

    def give(self, holder: Server, key: bytes, claimed: tuple[bytes, ...]) -> list:
        assert holder.store is not None
        if holder.is_hostile and self.settings.hostile == FLOOD:
            known = holder.store.get(key, now=self.now)[:1]
            return list(known) * len(claimed)
        return list(holder.store.get(key, now=self.now, peers=claimed))

    def look_lightly(self, server: Server) -> None:
        """Asks as a reader would that remembers, and forgets the answers."""
        if not server.is_alive or server.has_left:
            return
        model = self.rng.choice(self.readers).memory.sample
        sample = Sample(server.digest)
        sample.level = model.level
        share = self._fetched["fetched"] / max(1, self._fetched["listed"])
        shards = sample.shards
        if sample.share < 1:  # as `ModelMemory.due`: about every second time
            shards = self.rng.sample(shards, round(len(shards) * self._due))
        for shard in shards:
            key = shard.key(KEY)
            holders = [each for each in self.holders_of(key) if each.is_alive]
            good = [each for each in holders if not each.is_hostile] or holders
            asked = good if sample.level == 0 else [self.rng.choice(good)]
            for holder in asked:
                assert holder.store is not None
                count = holder.store.count(key, now=self.now)
                fetched = share * count
                answer = self.sizes.list_of(count) + fetched * self.sizes.record
                request = self.sizes.list_request + fetched * self.sizes.digest
                self.count(server, holder, request, answer)
                server.traffic.reads += self.is_counting and server is not holder
        seen = round((model.servers or 0.0) * sample.share)
        self.at_next_look(seen, lambda: self.look_lightly(server))
