"""What the messages of a simulated directory say and how many bytes they have."""

from __future__ import annotations

import hashlib
import random

from p2p.directory_author import Author
from p2p.wire.directory_messages import (
    MAX_RECORDS_PER_MESSAGE,
    ROW_BYTES,
    GetRecords,
    ListRecords,
    RecordList,
    Records,
)
from p2p.wire.message import encode_message
from p2p.wire.replies import Ok
from petald.announcer import TTL_S
from petald.swarm import Announcement, RoundTripTo, directory_key

MODEL = bytes(range(32))
KEY = directory_key(MODEL)
SIGNATURE = b"x" * 64

STREAM_BYTES = 160
"""What each end sends for a stream beside messages: multistream-select's two lines (20 and 21
bytes), and the headers of yamux (12) and of Noise (18) round some three writes."""


class Sizes:
    """Bytes of messages, as they are encoded."""

    def __init__(self, body: bytes) -> None:
        peer = f"12D3KooW{0:044}"
        author = Author(peer, sign=lambda _: SIGNATURE, make_secret=bytes)
        own = author.say(KEY, body, ttl_s=TTL_S, sequence=10**12, wall_now=1e9)
        key = hashlib.sha256(KEY).digest()
        self.put = len(encode_message(own.whole))
        self.beat = len(encode_message(own.refresh))
        self.ok = len(encode_message(Ok()))
        self.list_request = len(encode_message(ListRecords(key=key)))
        self._list = len(encode_message(RecordList(rows=b"")))
        self._records = len(encode_message(Records(records=())))
        self.record = len(encode_message(Records(records=(own.record,)))) - self._records
        peers = GetRecords(key=key, peers=(bytes(8),))
        self.digest = len(encode_message(GetRecords(key=key, peers=(bytes(8),) * 2))) - len(
            encode_message(peers)
        )
        self._get = len(encode_message(peers)) - self.digest

    def list_of(self, rows: int) -> int:
        return self._list + ROW_BYTES * rows

    def get(self, count: int) -> int:
        return self._get + self.digest * count

    def records(self, count: int) -> int:
        return self._records + self.record * count

    def whole_read(self, servers: int) -> int:
        """One read of all records from one holder, as it was under one key."""
        messages = -(-servers // MAX_RECORDS_PER_MESSAGE)
        return self.list_request + messages * self._records + servers * self.record


def make_announcement(number: int, rng: random.Random) -> bytes:
    """What a server says that serves blocks of a model and knows its next hops."""
    start = rng.randrange(70)
    return Announcement(
        model=MODEL,
        start=start,
        end=start + 10,
        state="serving",
        step_ms=round(rng.uniform(5, 50), 3),
        cache_tokens=65_536,
        free_cache_tokens=number % 65_536,
        dtype="bfloat16",
        quant="nf4",
        version="0.1.0",
        addresses=("/ip4/203.0.113.77/tcp/31330", "/ip4/192.168.178.100/tcp/31330"),
        queue_ms=round(rng.uniform(0, 9), 3),
        prefill_ms=round(rng.uniform(1, 9), 3),
        round_trips=tuple(
            RoundTripTo(peer=rng.randbytes(8), ms=round(rng.uniform(1, 200), 2)) for _ in range(4)
        ),
    ).encode()
