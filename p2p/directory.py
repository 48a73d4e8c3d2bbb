"""The directory: records put to, and read from, the peers nearest to a key.

A holder takes a record only from the peer whose it is, which its connection has proven, so nobody
can put again what somebody else once said. Readers check signatures, since holders may lie, and ask
several, since they may withhold. Invariant: a lookup ends within its deadline, whoever hangs.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable

import trio

from p2p.directory_store import DirectoryStore
from p2p.errors import P2PError, RecordRejected, RemoteProtocolError
from p2p.network import Network, Stream
from p2p.rpc import FIRST_MESSAGE_BYTES, MessageStream, call, receive_first
from p2p.wire.directory_messages import (
    DIRECTORY_PROTOCOL,
    MAX_RECORDS_PER_MESSAGE,
    GetRecords,
    PutRecord,
    Records,
    SignedRecord,
    signed_bytes,
)
from p2p.wire.message import expect
from p2p.wire.replies import Ok, Refusal

HOLDERS = 8
"""Peers that keep each record: with half of them gone between two announcements, as in the worst
churn that Kademlia's paper reports, one is left in 255 of 256 cases."""

CALL_DEADLINE_S = 5.0
LOOKUP_DEADLINE_S = 6.0
SERVE_DEADLINE_S = 20.0
HELLO_DEADLINE_S = 10.0
GRACE_S = 1.0
"""For the slower holders, once one has answered with records."""

CLOCK_SKEW_S = 600.0
"""How wrong a peer's clock may be. Holders expire records by their own clocks; this bound only
keeps a lying holder from giving out records of long ago."""

MAX_RECORDS_READ = 16_384
MAX_FRAME_BYTES = 2 * 1024 * 1024
MAX_CHECKED = 65_536


class Directory:
    """Puts and reads records, and keeps those of others.

    Args:
        network: the way to the other holders; the protocol's handler is set on it.
        store: what this peer keeps.
        clock: seconds on this peer's own clock, which never goes back.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        network: Network,
        *,
        store: DirectoryStore | None = None,
        clock: Callable[[], float] = trio.current_time,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._network = network
        self._store = store or DirectoryStore()
        self._clock = clock
        self._wall_clock = wall_clock
        self._checked: OrderedDict[bytes, None] = OrderedDict()
        network.set_handler(DIRECTORY_PROTOCOL, self._serve)

    async def publish(self, key: bytes, body: bytes, *, ttl_s: float, sequence: int) -> int:
        """Puts the own record under a key, to its nearest peers.

        Args:
            key: 32 bytes.
            body: at most `MAX_BODY_BYTES`.
            ttl_s: at most `MAX_TTL_S`.
            sequence: higher than that of the record before it.

        Returns:
            How many holders took it, the own peer among them.
        """
        record = self._sign(key, body, ttl_s, sequence)
        taken = 0

        async def put(peer: str) -> None:
            nonlocal taken
            try:
                if peer == self._network.peer:
                    self._store.put(record, now=self._clock())
                else:
                    with trio.fail_after(CALL_DEADLINE_S):
                        await call(
                            self._network, peer, DIRECTORY_PROTOCOL, PutRecord(record=record), Ok
                        )
                taken += 1
            except (P2PError, trio.TooSlowError):
                pass  # this is why there are several holders

        async with trio.open_nursery() as nursery:
            for holder in await self._network.find_closest_peers(key, HOLDERS):
                nursery.start_soon(put, holder.peer)
        return taken

    async def lookup(self, key: bytes) -> tuple[SignedRecord, ...]:
        """Reads every record under a key: the newest that any holder gave for each peer."""
        newest: dict[str, SignedRecord] = {}

        def merge(records: tuple[SignedRecord, ...]) -> None:
            for record in records:
                known = newest.get(record.peer)
                if known is None and len(newest) >= MAX_RECORDS_READ:
                    continue
                if (known is None or record.sequence > known.sequence) and self._is_true(
                    record, key
                ):
                    newest[record.peer] = record

        async def read(peer: str) -> None:
            try:
                if peer == self._network.peer:
                    merge(self._store.get(key, now=self._clock()))
                else:
                    with trio.fail_after(CALL_DEADLINE_S):
                        await self._read_from(peer, key, merge)
            except (P2PError, trio.TooSlowError):
                pass  # this is why several are asked

        async def read_one(peer: str, scope: trio.CancelScope) -> None:
            await read(peer)
            if newest:  # the others have had the same time, and one of them may hang
                scope.deadline = min(scope.deadline, trio.current_time() + GRACE_S)

        with trio.move_on_after(LOOKUP_DEADLINE_S) as scope:
            async with trio.open_nursery() as nursery:
                for holder in await self._network.find_closest_peers(key, HOLDERS):
                    nursery.start_soon(read_one, holder.peer, scope)
        return tuple(newest.values())

    async def _read_from(
        self, peer: str, key: bytes, merge: Callable[[tuple[SignedRecord, ...]], None]
    ) -> None:
        stream = await self._network.open_stream(peer, DIRECTORY_PROTOCOL)
        async with MessageStream(stream, max_frame_bytes=MAX_FRAME_BYTES) as messages:
            await messages.send(GetRecords(key=key))
            read = 0
            while read < MAX_RECORDS_READ:
                reply = await messages.receive()
                if reply is None:
                    return
                part = expect(reply, Records)
                merge(part.records)
                read += len(part.records)
                if part.is_last or not part.records:
                    return

    def _sign(self, key: bytes, body: bytes, ttl_s: float, sequence: int) -> SignedRecord:
        issued_at = self._wall_clock()
        peer = self._network.peer
        signature = self._network.sign(
            signed_bytes(
                peer=peer,
                key=key,
                sequence=sequence,
                issued_at=issued_at,
                ttl_s=ttl_s,
                body=body,
            )
        )
        return SignedRecord(
            peer=peer,
            key=key,
            sequence=sequence,
            issued_at=issued_at,
            ttl_s=ttl_s,
            body=body,
            signature=signature,
        )

    def _is_true(self, record: SignedRecord, key: bytes) -> bool:
        """Whether a record is its peer's, under this key, and not of long ago."""
        age_s = self._wall_clock() - record.issued_at
        if record.key != key or not -CLOCK_SKEW_S <= age_s <= record.ttl_s + CLOCK_SKEW_S:
            return False
        return self._has_true_signature(record)

    def _has_true_signature(self, record: SignedRecord) -> bool:
        """Checks a signature, once for each record: the same ones are read again and again."""
        data = record.signed_bytes()
        digest = hashlib.sha256(data + record.signature).digest()
        if digest in self._checked:
            return True
        if not self._network.verify(record.peer, data, record.signature):
            return False
        self._checked[digest] = None
        if len(self._checked) > MAX_CHECKED:
            self._checked.popitem(last=False)
        return True

    async def _serve(self, stream: Stream) -> None:
        with trio.move_on_after(SERVE_DEADLINE_S):
            async with MessageStream(
                stream, max_frame_bytes=MAX_FRAME_BYTES, max_received_bytes=FIRST_MESSAGE_BYTES
            ) as messages:
                request = await receive_first(messages, HELLO_DEADLINE_S)
                if isinstance(request, PutRecord):
                    await messages.send(self._take(request.record, messages.remote_peer))
                elif isinstance(request, GetRecords):
                    await self._give(messages, request.key)
                else:
                    raise RemoteProtocolError(f"{request.MESSAGE_NAME!r} is no directory request")

    def _take(self, record: SignedRecord, remote_peer: str) -> Ok | Refusal:
        try:
            if record.peer != remote_peer:
                raise RecordRejected("a record is taken only from the peer whose it is")
            if not self._has_true_signature(record):
                raise RecordRejected("the signature is not the peer's")
            self._store.put(record, now=self._clock())
        except RecordRejected as error:
            return Refusal(code=error.code, text=str(error))
        return Ok()

    async def _give(self, messages: MessageStream, key: bytes) -> None:
        records = self._store.get(key, now=self._clock())
        starts = range(0, max(len(records), 1), MAX_RECORDS_PER_MESSAGE)
        for start in starts:
            await messages.send(
                Records(
                    records=records[start : start + MAX_RECORDS_PER_MESSAGE],
                    is_last=start == starts[-1],
                )
            )
