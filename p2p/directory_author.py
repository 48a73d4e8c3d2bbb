"""What a peer says of itself in the directory: when to sign anew, and when a beat will do.

Pure. Signatures, secrets and the time are handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from p2p.beats import BEAT_BYTES, BEAT_S, MAX_BEATS, BeatChain
from p2p.wire.directory_messages import PutBeat, PutRecord, SignedRecord, signed_bytes


@dataclass(slots=True)
class OwnRecord:
    """The own record under a key.

    Attributes:
        record: as it was signed.
        chain: of its beats.
        number: of the last beat that was told.
        holders: those that have taken the record, for which a beat is enough.
    """

    record: SignedRecord
    chain: BeatChain
    number: int = 0
    holders: set[str] = field(default_factory=set)

    @property
    def whole(self) -> PutRecord:
        """What a holder is told that has not got the record."""
        beat = self.chain.beat(self.number) if self.number else b""
        return PutRecord(record=self.record, number=self.number, beat=beat)

    @property
    def refresh(self) -> PutBeat:
        """What a holder is told that has got it."""
        return PutBeat(
            key=self.record.key,
            sequence=self.record.sequence,
            number=self.number,
            beat=self.chain.beat(self.number),
        )

    def message_for(self, holder: str) -> PutRecord | PutBeat:
        """What to tell a holder."""
        return self.refresh if holder in self.holders else self.whole


class Author:
    """The records of one peer.

    Args:
        peer: whose.
        sign: makes a signature.
        make_secret: gives that many bytes that nobody can guess.
    """

    def __init__(
        self, peer: str, *, sign: Callable[[bytes], bytes], make_secret: Callable[[int], bytes]
    ) -> None:
        self._peer = peer
        self._sign = sign
        self._make_secret = make_secret
        self._own: dict[bytes, OwnRecord] = {}

    def say(
        self, key: bytes, body: bytes, *, ttl_s: float, sequence: int, wall_now: float
    ) -> OwnRecord:
        """What holds under a key from now on: the record that there is, if it says the same."""
        own = self._own.get(key)
        if own is not None and (own.record.body, own.record.ttl_s) == (body, ttl_s):
            number = int((wall_now - own.record.issued_at) // BEAT_S)
            if own.number < number <= MAX_BEATS:
                own.number = number
                return own
        if own is not None:  # the clock that the sequence is of may have been set back
            sequence = max(sequence, own.record.sequence + 1)
        own = self._own[key] = self._sign_record(key, body, ttl_s, sequence, wall_now)
        return own

    def forget_all_but(self, keys: tuple[bytes, ...]) -> None:
        """Forgets the records under all other keys, which are told no more."""
        for key in [key for key in self._own if key not in keys]:
            del self._own[key]

    def _sign_record(
        self, key: bytes, body: bytes, ttl_s: float, sequence: int, wall_now: float
    ) -> OwnRecord:
        chain = BeatChain(self._make_secret(BEAT_BYTES))
        signature = self._sign(
            signed_bytes(
                peer=self._peer,
                key=key,
                sequence=sequence,
                issued_at=wall_now,
                ttl_s=ttl_s,
                body=body,
                beat=chain.end,
            )
        )
        record = SignedRecord(
            peer=self._peer,
            key=key,
            sequence=sequence,
            issued_at=wall_now,
            ttl_s=ttl_s,
            body=body,
            beat=chain.end,
            signature=signature,
        )
        return OwnRecord(record, chain)
