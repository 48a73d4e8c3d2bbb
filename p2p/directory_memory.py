"""What a reader knows of the records under one key, and what it makes of the holders' answers.

Pure. Holders may lie, withhold and flood. What they tell is checked by signatures and beats; what
they withhold is found by what others told, now or at earlier reads, since a record is remembered
until it would have expired; what they flood is cut off at fixed numbers. Invariant: a record is
given for `ttl_s` after the newest beat of it that anybody told, and no longer, whatever a holder
says; bodies that are known are not fetched again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum

from p2p.beats import BEAT_S, is_beat
from p2p.shards import peer_digest
from p2p.wire.directory_messages import MAX_RECORDS_PER_MESSAGE, MAX_ROWS, Row, SignedRecord

CLOCK_SKEW_S = 600.0
"""How wrong a peer's clock may be. Holders expire records by their own clocks; this bound only
keeps a lying holder from giving out records of long ago."""

MAX_KNOWN = 8 * MAX_ROWS
"""Under one key: what eight holders can tell that have nothing in common."""

MOST_LACKING = 1 / 8
"""Of what lives; a holder whose list lacks more is taken to withhold, or to have come near the key
only after authors had last looked who is near."""

FADING_S = 12.0
"""Before a record expires; readers look every 11 s or so."""

ALL_ASKED_S = 20.0
"""After all holders were asked nobody that lives can fade for so long: one of them told its beat,
which was a period of announcements old at most. So whoever makes records fade, by letting many
identities die, makes readers ask eight holders in this time and not at each look."""

REFUSED_S = 60.0
"""For so long a record that was not of now is not fetched again; then a clock may have been set."""

RIGHT_CLOCK_S = 40.0
"""A record with a lower sequence than one that has expired is believed where it differs from the
own clock by no more: its author's clock was put right. What the author had said before is older,
since servers' records hold for 45 s."""

CLAIM_S = 0.4
"""Where a holder has not given records for so long, another one is asked for them, too, and after
half as long the next. So however many hang, all that listed a record are asked for it within twice
this time, which is less than a reader waits for slow holders."""

MOST_MISSING = 8
MOST_MISSING_PART = 1 / 2
"""Of the records that are fetched from a holder, those it may not have any more: some expire, and
an author can make that more, which is not to be held against the holder."""


@dataclass(slots=True)
class Known:
    """A record that was checked.

    Attributes:
        record: as its author signed it.
        number: of its newest beat.
        beat: of that number.
        arrived_at: when holders got that beat, by the youngest age that was told; on the own clock.
        heard_at: when this reader first heard of that beat.
    """

    record: SignedRecord
    number: int
    beat: bytes
    arrived_at: float
    heard_at: float

    @property
    def peer(self) -> str:
        """Whose it is."""
        return self.record.peer

    @property
    def body(self) -> bytes:
        """What is stated."""
        return self.record.body

    @property
    def version(self) -> tuple[int, int]:
        """Of two, the higher was told later by its author."""
        return self.record.sequence, self.number

    @property
    def expires_at(self) -> float:
        """Until when it is believed."""
        return self.arrived_at + self.record.ttl_s


class _Taken(Enum):
    """What a record was that a holder gave."""

    TRUE = "true"
    OTHER = "other"
    """Its author's, but not what was listed."""
    LIE = "lie"


@dataclass(frozen=True, slots=True)
class _Fetch:
    """A record that is being fetched.

    Attributes:
        holder: who was asked for it last.
        patience_s: how long it has.
        stale_at: from when on another one may be asked.
    """

    holder: str
    patience_s: float
    stale_at: float


class KeyMemory:
    """What one reader knows under one key.

    Args:
        key: of the records.
        is_signed: whether a record's signature is its peer's.
        holds: whether a digest belongs under the key; where there is none, all do.

    Attributes:
        liars: holders that gave at this read what no author signed or nobody asked for.
        silent: holders that listed at this read what they then did not give, or not in time.
    """

    def __init__(
        self,
        key: bytes,
        *,
        is_signed: Callable[[SignedRecord], bool],
        holds: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.key = key
        self.liars: set[str] = set()
        self.silent: set[str] = set()
        self._is_signed = is_signed
        self._holds = holds
        self._known: dict[bytes, Known] = {}
        self._lists: dict[str, frozenset[bytes]] = {}
        self._wanted: dict[str, dict[bytes, Row]] = {}
        self._expected: Mapping[bytes, float] = {}
        self._refused: dict[bytes, int] = {}
        self._refused_at = 0.0
        self._dead: dict[bytes, tuple[int, float]] = {}
        self._under_way: dict[bytes, _Fetch] = {}
        self._claimed: dict[str, dict[bytes, Row]] = {}
        self._now = self._wall_now = 0.0
        self._read_at: float | None = None
        self._is_cold = True
        self._all_asked_at = -ALL_ASKED_S

    def begin(self, now: float, expected: Mapping[bytes, float] | None = None) -> None:
        """A read begins: forgets what the one before left, and whoever is long dead.

        A record is remembered for as long as a liar could bring it up again.

        Args:
            now: seconds on the own clock.
            expected: until when others live, by their digests, that are to be found under this key
                and are known by another one, which was read before.
        """
        self._expected = expected or {}
        self.liars.clear()
        self.silent.clear()
        self._lists.clear()
        self._wanted.clear()
        self._under_way.clear()
        self._claimed.clear()
        if now - self._refused_at > REFUSED_S or len(self._refused) > MAX_KNOWN:
            self._refused.clear()
            self._refused_at = now
        longest_ttl_s = max((one.record.ttl_s for one in self._known.values()), default=0.0)
        self._is_cold = self._read_at is None or now - self._read_at > longest_ttl_s
        for digest, one in list(self._known.items()):
            if now - one.heard_at > 2 * CLOCK_SKEW_S + one.record.ttl_s:
                del self._known[digest]
        for digest, (_, forgotten_at) in list(self._dead.items()):
            if now > forgotten_at:
                del self._dead[digest]

    def on_list(self, holder: str, rows: Sequence[Row], *, now: float, wall_now: float) -> None:
        """Takes a holder's list."""
        self._now, self._wall_now = now, wall_now
        wanted: dict[bytes, Row] = {}
        rows = rows[:MAX_ROWS]
        if self._holds is not None:
            rows = [row for row in rows if self._holds(row.peer)]
        for row in rows:
            known = self._known.get(row.peer)
            if self._is_news(row.peer, row.sequence):
                if row.sequence != self._refused.get(row.peer):
                    wanted[row.peer] = row
            elif known is not None:
                self._take_beat(known, row)
        self._lists[holder] = frozenset(row.peer for row in rows)
        self._wanted[holder] = wanted

    def claim(self, holder: str, now: float) -> tuple[bytes, ...]:
        """What to fetch from a holder now: what it listed, is not known, and not being fetched.

        What another one has been asked for and has not given in time counts as not being fetched.
        Give it to `on_records`, or to `release` where no answer came.
        """
        chosen: dict[bytes, Row] = {}
        for digest in self._open(holder):
            fetch = self._under_way.get(digest)
            if fetch is None or fetch.stale_at <= now:
                chosen[digest] = self._wanted[holder][digest]
                if len(chosen) == MAX_RECORDS_PER_MESSAGE:
                    break
        for digest in chosen:
            fetch = self._under_way.get(digest)
            patience_s = CLAIM_S if fetch is None else fetch.patience_s / 2
            self._under_way[digest] = _Fetch(holder, patience_s, now + patience_s)
        self._claimed[holder] = chosen
        return tuple(chosen)

    def waits_until(self, holder: str) -> float | None:
        """Until when something that this holder could give is being fetched from others only."""
        open_ones = (self._under_way.get(digest) for digest in self._open(holder))
        return min((fetch.stale_at for fetch in open_ones if fetch is not None), default=None)

    def release(self, holder: str, claimed: Iterable[bytes], now: float) -> None:
        """No answer came from a holder of which these were claimed."""
        for digest in claimed:
            fetch = self._under_way.get(digest)
            if fetch is None or fetch.holder != holder or fetch.stale_at <= now:
                self.silent.add(holder)
        self._end_claim(holder, claimed)

    def on_records(
        self,
        holder: str,
        claimed: Sequence[bytes],
        records: Iterable[SignedRecord],
        *,
        now: float,
        wall_now: float,
    ) -> None:
        """Takes records that were fetched from a holder.

        At the first one that cannot be true, the rest of them and all else that the holder listed
        is passed over: each costs a check of a signature.
        """
        self._now, self._wall_now = now, wall_now
        asked = set(claimed)
        missing = len(asked)
        listed = self._claimed.get(holder, {})
        for record in records:
            digest = peer_digest(record.peer)
            if digest not in asked:
                self._convict(holder)
                break
            asked.discard(digest)
            taken = self._take_record(record, listed[digest], now)
            if taken == _Taken.LIE:
                self._convict(holder)
                break
            missing -= taken == _Taken.TRUE
        if missing > max(MOST_MISSING, len(claimed) * MOST_MISSING_PART):
            self.silent.add(holder)
            self._wanted[holder] = {}
        self._end_claim(holder, claimed)

    def is_enough(self, now: float) -> bool:
        """Whether the holders' answers so far can be believed to be the whole.

        One is enough that has nearly all that lives by what is remembered; two where nothing is.
        What they listed must have been fetched, too. And nobody is to be forgotten before all
        holders were asked: who crashed is asked for in this way once or twice, and whom some
        holders hide is found at others.
        """
        living = self._to_be_listed(now)
        good = sum(not self._is_lacking(holder, living.keys()) for holder in self._lists)
        if good < (2 if self._is_cold else 1) or any(map(self._open, self._lists)):
            return False
        return now - self._all_asked_at < ALL_ASKED_S or not any(
            until - now < FADING_S for until in living.values()
        )

    def on_all_asked(self, now: float) -> None:
        """Nobody is left to ask at this read."""
        self._all_asked_at = now

    def find_bad(self, holders: Iterable[str], now: float) -> list[str]:
        """Those that did not answer, lied, or lack much of what lives."""
        living = self._to_be_listed(now).keys()
        return [holder for holder in holders if self._is_lacking(holder, living)]

    @property
    def read_at(self) -> float | None:
        """When a read ended last in which a holder answered."""
        return self._read_at

    @property
    def is_cold(self) -> bool:
        """Whether what is remembered from earlier reads is of no use."""
        return self._is_cold

    def finish(self, now: float) -> None:
        """A read ends: what lists said of records that came only after them counts, too."""
        for holder in self._lists:
            self._open(holder)
        if self._lists:
            self._read_at = now

    def living(self, now: float) -> dict[bytes, Known]:
        """The records that hold, by the digests of whose they are."""
        return {digest: one for digest, one in self._known.items() if one.expires_at > now}

    def _to_be_listed(self, now: float) -> dict[bytes, float]:
        """Until when each lives that a holder should know."""
        until = dict(self._expected)
        for digest, one in self._known.items():
            if one.record.ttl_s > 2 * FADING_S:  # others are not for long, and fade at once
                until[digest] = one.expires_at
        return {digest: at for digest, at in until.items() if at > now}

    def _is_lacking(self, holder: str, living: Set[bytes]) -> bool:
        listed = self._lists.get(holder)
        if listed is None or holder in self.liars or holder in self.silent:
            return True
        lacking = len(living - listed)
        return len(listed) < MAX_ROWS and lacking > len(living) * MOST_LACKING

    def _open(self, holder: str) -> list[bytes]:
        """What a holder listed and nobody has given."""
        wanted = self._wanted.get(holder, {})
        for digest, row in list(wanted.items()):
            known = self._known.get(digest)
            if known is not None and not self._is_news(digest, row.sequence):
                del wanted[digest]
                self._take_beat(known, row)
        return list(wanted)

    def _is_news(self, digest: bytes, sequence: int) -> bool:
        """Whether a record is another than the one that is known, and may take its place.

        One of a lower sequence may, where the one that is known has expired.
        """
        known = self._known.get(digest)
        if known is None or sequence == known.record.sequence:
            return known is None
        if digest in self._dead and sequence == self._dead[digest][0]:
            return False
        return sequence > known.record.sequence or known.expires_at <= self._now

    def _skew_s(self, digest: bytes, sequence: int) -> float:
        """How wrong the clock may be that a record was made by."""
        known = self._known.get(digest)
        dead = self._dead.get(digest, (-1, 0.0))[0]
        is_lower = known is not None and sequence < max(known.record.sequence, dead)
        return RIGHT_CLOCK_S if is_lower else CLOCK_SKEW_S

    def _end_claim(self, holder: str, claimed: Iterable[bytes]) -> None:
        self._claimed.pop(holder, None)
        for digest in claimed:
            self._wanted[holder].pop(digest, None)
            fetch = self._under_way.get(digest)
            if fetch is not None and fetch.holder == holder:
                del self._under_way[digest]

    def _convict(self, holder: str) -> None:
        self.liars.add(holder)
        self._wanted[holder] = {}

    def _take_beat(self, known: Known, row: Row) -> None:
        """Takes what a list says of a record that is known.

        A beat that is of another chain is passed over, and is not held against the holder: the
        author may have told it another record under the same number.
        """
        now = self._now
        if row.sequence != known.record.sequence:
            return
        if row.number > known.number:
            is_true = is_beat(row.beat, row.number, known.beat, known.number)
            if is_true and self._is_of_now(known.record, row.number):
                known.number, known.beat, known.heard_at = row.number, row.beat, now
                known.arrived_at = max(known.arrived_at, now - row.age_s)
        elif row.number == known.number:
            youngest = min(now - row.age_s, known.heard_at)
            known.arrived_at = max(known.arrived_at, youngest)

    def _take_record(self, record: SignedRecord, row: Row, now: float) -> _Taken:
        """Takes a record that a holder listed.

        Another one than the list promised is not the holder's lie: its author may have let the one
        expire and put another since, with a lower number or of another chain.
        """
        if record.key != self.key or not self._is_signed(record):
            return _Taken.LIE
        number, beat, age_s = 0, record.beat, 0.0
        if record.sequence == row.sequence:
            number, beat, age_s = row.number, row.beat, row.age_s
            if not is_beat(beat, number, record.beat, 0):
                return _Taken.OTHER
        elif record.sequence < row.sequence:
            return _Taken.OTHER
        if not self._is_of_now(record, number, self._skew_s(row.peer, record.sequence)):
            self._refused[row.peer] = record.sequence  # not by the holder's fault, perhaps
            return _Taken.TRUE
        known = self._known.get(row.peer)
        if known is None and len(self._known) >= MAX_KNOWN:
            del self._known[min(self._known, key=lambda one: self._known[one].expires_at)]
        if self._is_news(row.peer, record.sequence):
            if known is not None and record.sequence < known.record.sequence:
                forgotten_at = known.heard_at + 2 * CLOCK_SKEW_S + known.record.ttl_s
                self._dead[row.peer] = known.record.sequence, forgotten_at
            self._known[row.peer] = Known(record, number, beat, now - age_s, now)
        return _Taken.TRUE

    def _is_of_now(self, record: SignedRecord, number: int, skew_s: float = CLOCK_SKEW_S) -> bool:
        """Whether a beat was made lately, by its author's clock."""
        age_s = self._wall_now - record.issued_at - number * BEAT_S
        past_s = skew_s if skew_s < CLOCK_SKEW_S else record.ttl_s + skew_s
        return -skew_s <= age_s <= past_s
