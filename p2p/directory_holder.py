"""Keeping records for others: the serving side of the directory.

Invariant: whatever a peer sends, it gets an answer or the end of its stream, and the store keeps
only records whose author sent them over a connection that has proven who it is.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import trio

from p2p.addresses import neighbourhood
from p2p.directory_store import DirectoryStore
from p2p.errors import RecordRejected, RemoteProtocolError
from p2p.network import Network, Stream
from p2p.rpc import FIRST_MESSAGE_BYTES, MessageStream, receive_first
from p2p.wire.directory_messages import (
    GetRecords,
    ListRecords,
    PutBeat,
    PutRecord,
    RecordList,
    Records,
    SignedRecord,
    encode_rows,
)
from p2p.wire.message import Message
from p2p.wire.replies import Ok, Refusal

SERVE_DEADLINE_S = 20.0
HELLO_DEADLINE_S = 10.0

MAX_QUESTIONS = 8
"""On one stream: the list, then all of its records in messages of 128, and some."""

MAX_FRAME_BYTES = 1024 * 1024
MAX_CHECKED = 65_536


class SignatureChecks:
    """Checks signatures, once for each record: the same ones come again and again.

    Args:
        verify: as `Network.verify`.
    """

    def __init__(self, verify: Callable[[str, bytes, bytes], bool]) -> None:
        self._verify = verify
        self._checked: OrderedDict[bytes, None] = OrderedDict()

    def is_signed(self, record: SignedRecord) -> bool:
        """Whether the signature is that of the record's peer."""
        data = record.signed_bytes()
        digest = hashlib.sha256(data + record.signature).digest()
        if digest in self._checked:
            return True
        if not self._verify(record.peer, data, record.signature):
            return False
        self._checked[digest] = None
        if len(self._checked) > MAX_CHECKED:
            self._checked.popitem(last=False)
        return True


class DirectoryHolder:
    """Answers for a store.

    Args:
        network: whose streams are served.
        store: what is kept.
        checks: of signatures.
        clock: seconds on this peer's own clock.
    """

    def __init__(
        self,
        network: Network,
        store: DirectoryStore,
        checks: SignatureChecks,
        clock: Callable[[], float],
    ) -> None:
        self._network = network
        self._store = store
        self._checks = checks
        self._clock = clock

    async def serve(self, stream: Stream) -> None:
        """Answers the questions on one stream."""
        with trio.move_on_after(SERVE_DEADLINE_S):
            async with MessageStream(
                stream, max_frame_bytes=MAX_FRAME_BYTES, max_received_bytes=FIRST_MESSAGE_BYTES
            ) as messages:
                part = neighbourhood(stream.remote_host)
                request: Message | None = await receive_first(messages, HELLO_DEADLINE_S)
                for _ in range(MAX_QUESTIONS):
                    if request is None:
                        return
                    await messages.send(self._answer(request, messages.remote_peer, part))
                    request = await messages.receive()

    def keep(self, request: PutRecord | PutBeat, remote_peer: str, part: str) -> None:
        """Takes what a peer says of itself.

        Args:
            request: what it says.
            remote_peer: who it is, as its connection has proven.
            part: the neighbourhood that it is in.

        Raises:
            RecordRejected: it is not to be kept.
        """
        now = self._clock()
        if isinstance(request, PutBeat):
            self._store.put_beat(
                request.key,
                remote_peer,
                sequence=request.sequence,
                number=request.number,
                beat=request.beat,
                now=now,
            )
            return
        if request.record.peer != remote_peer:
            raise RecordRejected("a record is taken only from the peer whose it is")
        if not self._checks.is_signed(request.record):
            raise RecordRejected("the signature is not the peer's")
        self._store.put(
            request.record,
            now=now,
            number=request.number,
            beat=request.beat,
            neighbourhood=part,
        )

    def _answer(self, request: Message, remote_peer: str, part: str) -> Message:
        now = self._clock()
        if isinstance(request, PutRecord | PutBeat):
            try:
                self.keep(request, remote_peer, part)
            except RecordRejected as error:
                return Refusal(code=error.code, text=str(error))
            return Ok()
        if isinstance(request, ListRecords):
            return RecordList(rows=encode_rows(self._store.list_rows(request.key, now=now)))
        if isinstance(request, GetRecords):
            return Records(records=self._store.get(request.key, now=now, peers=request.peers))
        raise RemoteProtocolError(f"{request.MESSAGE_NAME!r} is no directory request")
