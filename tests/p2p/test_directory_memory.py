"""What a reader makes of holders' answers: what it fetches, believes, and asks further for."""

from __future__ import annotations

import dataclasses
import random

import pytest

from p2p.beats import BEAT_S, BeatChain
from p2p.directory_author import Author, OwnRecord
from p2p.directory_memory import CLAIM_S, CLOCK_SKEW_S, FADING_S, MAX_KNOWN, KeyMemory
from p2p.holder_choice import (
    COLD_ASKED,
    HOLDERS,
    REMEMBERED_S,
    WARM_ASKED,
    HolderBook,
    Standing,
    asked_at_once,
)
from p2p.shards import Shard, peer_digest
from p2p.wire.directory_messages import (
    MAX_ROWS,
    PutBeat,
    PutRecord,
    Row,
    SignedRecord,
    decode_rows,
    encode_rows,
)

KEY = b"k" * 32
TTL_S = 45.0


def make_secret(count: int) -> bytes:
    return b"s" * count


def make_author(peer: str) -> Author:
    return Author(peer, sign=lambda data: b"x" * 64, make_secret=make_secret)


def say(author: Author, body: bytes = b"body", *, at: float = 0.0, sequence: int = 1) -> OwnRecord:
    return author.say(KEY, body, ttl_s=TTL_S, sequence=sequence, wall_now=at)


def make_memory() -> KeyMemory:
    return KeyMemory(KEY, is_signed=lambda record: record.signature == b"x" * 64)


def row_of(own: OwnRecord, age_s: float = 0.0) -> Row:
    digest = peer_digest(own.record.peer)
    beat = own.chain.beat(own.number)
    return Row(digest, own.record.sequence, own.number, age_s, beat)


def read(
    memory: KeyMemory, holder: str, *told: OwnRecord, now: float, age_s: float = 0.0
) -> tuple[bytes, ...]:
    """A whole answer of an honest holder; gives what was fetched."""
    memory.on_list(holder, [row_of(own, age_s) for own in told], now=now, wall_now=now)
    fetched = memory.claim(holder, now)
    if fetched:
        records = {peer_digest(own.record.peer): own.record for own in told}
        given = [records[digest] for digest in fetched]
        memory.on_records(holder, fetched, given, now=now, wall_now=now)
    return fetched


def bodies(memory: KeyMemory, now: float) -> list[bytes]:
    return sorted(one.body for one in memory.living(now).values())


def test_an_author_signs_anew_only_what_changed():
    author = make_author("a")
    first = say(author)
    assert isinstance(first.message_for("holder"), PutRecord)
    first.holders.add("holder")
    again = say(author, at=15.0)
    assert again.record is first.record
    message = again.message_for("holder")
    assert isinstance(message, PutBeat)
    assert (message.number, message.sequence) == (1, 1)
    assert again.message_for("other").number == 1
    assert say(author, b"other", at=30.0, sequence=2).record.body == b"other"
    assert not say(author, b"other", at=31.0, sequence=3).number  # there is no beat for it yet
    assert say(author, b"other", at=1e6, sequence=4).number == 0  # nor any more


def test_a_list_survives_its_encoding():
    rows = [row_of(say(make_author(str(number))), number / 4) for number in range(9)]
    assert decode_rows(encode_rows(rows)) == rows


def test_what_is_known_is_not_fetched_again():
    memory, author = make_memory(), make_author("a")
    own = say(author)
    memory.begin(0)
    assert len(read(memory, "one", own, now=0)) == 1
    assert read(memory, "other", own, now=0) == ()
    memory.begin(15)
    assert read(memory, "one", say(author, at=15.0), now=15) == ()
    assert bodies(memory, 15 + TTL_S - 1) == [b"body"]
    memory.begin(30)
    assert len(read(memory, "one", say(author, b"new", at=30.0, sequence=2), now=30)) == 1
    assert bodies(memory, 30) == [b"new"]


def test_a_record_is_fetched_from_one_holder_at_a_time():
    memory, own = make_memory(), say(make_author("a"))
    memory.begin(0)
    for holder in ("one", "other"):
        memory.on_list(holder, [row_of(own)], now=0, wall_now=0)
    claimed = memory.claim("one", 0)
    assert memory.claim("other", 0) == ()
    assert memory.waits_until("other") == CLAIM_S
    memory.release("one", claimed, 0)
    assert memory.claim("one", 0) == ()
    assert memory.claim("other", 0) == claimed


def test_what_a_holder_does_not_give_in_time_is_fetched_from_others():
    memory, own = make_memory(), say(make_author("a"))
    memory.begin(0)
    holders = [str(number) for number in range(HOLDERS)]
    for holder in holders:
        memory.on_list(holder, [row_of(own)], now=0, wall_now=0)
    now = 0.0
    for holder in holders:
        claimed = memory.claim(holder, now)
        assert claimed
        until = memory.waits_until(holders[-1])
        assert until is not None
        now = until
    assert now < 2 * CLAIM_S
    memory.on_records(holders[-1], claimed, [own.record], now=now, wall_now=now)
    assert bodies(memory, now) == [b"body"]
    for holder in holders[:-1]:
        memory.release(holder, claimed, now)
    assert memory.find_bad(holders, now) == holders[:-1]


def test_an_answer_that_comes_late_is_no_lie():
    memory, own = make_memory(), say(make_author("a"))
    memory.begin(0)
    for holder in ("slow", "quick"):
        memory.on_list(holder, [row_of(own)], now=0, wall_now=0)
    claimed = memory.claim("slow", 0)
    read(memory, "quick", own, now=CLAIM_S)
    assert memory.is_enough(CLAIM_S)
    memory.on_records("slow", claimed, [own.record], now=1, wall_now=1)
    assert memory.find_bad(["slow", "quick"], 1) == []


def test_a_crashed_server_is_forgotten_whatever_a_holder_says():
    memory, author = make_memory(), make_author("a")
    say(author)
    own = say(author, at=15.0)
    for now in (15, 20, 40, 59):
        memory.begin(now)
        read(memory, "liar", own, now=now, age_s=0.0)
        assert bodies(memory, now) == [b"body"]
    for now in range(60, int(4 * CLOCK_SKEW_S), 30):
        memory.begin(now)
        read(memory, "liar", own, now=now, age_s=0.0)
        assert bodies(memory, now) == []


def test_the_age_of_a_beat_counts_by_the_youngest_that_is_told():
    memory, own = make_memory(), say(make_author("a"))
    memory.begin(30)
    read(memory, "slow", own, now=30, age_s=30.0)
    assert bodies(memory, TTL_S) == []
    read(memory, "quick", own, now=30, age_s=20.0)
    assert bodies(memory, TTL_S) == [b"body"]
    assert bodies(memory, 10 + TTL_S) == []


def test_a_record_of_long_ago_is_not_believed_and_fetched_once():
    memory, own = make_memory(), say(make_author("a"))
    now = TTL_S + CLOCK_SKEW_S + 1
    memory.begin(now)
    assert len(read(memory, "liar", own, now=now)) == 1
    memory.begin(now)
    assert read(memory, "liar", own, now=now) == ()
    assert bodies(memory, now) == []


@pytest.mark.parametrize(
    "change",
    [{"signature": bytes(64)}, {"key": b"x" * 32}, {"peer": "b"}],
    ids=str,
)
def test_the_first_forged_record_ends_what_is_taken_from_a_holder(change):
    memory = make_memory()
    told = [say(make_author(name)) for name in ("a", "c", "d")]
    memory.begin(0)
    memory.on_list("liar", [row_of(own) for own in told], now=0, wall_now=0)
    claimed = memory.claim("liar", 0)
    given = [told[0].record, dataclasses.replace(told[1].record, **change), told[2].record]
    memory.on_records("liar", claimed, given, now=0, wall_now=0)
    assert len(memory.living(0)) == 1
    assert memory.liars == {"liar"}
    memory.on_list("good", [row_of(own) for own in told], now=0, wall_now=0)
    assert len(memory.claim("good", 0)) == 2


def test_a_beat_of_another_chain_is_passed_over():
    memory, author = make_memory(), make_author("a")
    memory.begin(0)
    read(memory, "one", say(author), now=0)
    forged = dataclasses.replace(row_of(say(author, at=15.0)), number=2)
    memory.on_list("one", [forged], now=15, wall_now=15)
    assert memory.liars == set()  # its author may have told the holder another record
    assert bodies(memory, TTL_S) == []


def test_a_beat_that_was_held_back_for_long_revives_nobody():
    memory, author = make_memory(), make_author("a")
    memory.begin(0)
    read(memory, "one", say(author), now=0)
    own = say(author, at=15.0)
    late = 15 + TTL_S + CLOCK_SKEW_S + 1
    memory.begin(late)
    read(memory, "liar", own, now=late)
    assert bodies(memory, late) == []


def test_a_clock_that_is_set_back_does_not_silence_an_author():
    author = make_author("a")
    first = say(author, at=1000.0, sequence=1_000_000)
    again = say(author, at=900.0, sequence=900_000)
    assert again.record.sequence == first.record.sequence + 1


def test_an_author_whose_clock_was_put_right_is_seen_and_its_old_record_is_not():
    memory, author = make_memory(), make_author("a")
    memory.begin(0)
    ahead = say(author, b"ahead", at=300.0, sequence=300_000)
    read(memory, "one", ahead, now=0)
    memory.begin(60)
    right = say(make_author("a"), b"right", at=60.0, sequence=60_000)
    read(memory, "one", right, now=60)
    assert bodies(memory, 60) == [b"right"]
    memory.begin(61)
    read(memory, "liar", ahead, now=61)
    assert bodies(memory, 61) == [b"right"]


def test_what_a_crashed_server_had_said_before_its_last_word_is_not_believed():
    memory, author = make_memory(), make_author("a")
    first = say(author, b"first", at=0.0, sequence=1)
    second = say(author, b"second", at=10.0, sequence=2)
    memory.begin(10)
    read(memory, "one", second, now=10)
    for now in range(10, 600, 15):
        memory.begin(now)
        read(memory, "liar", first, now=now)
        assert bodies(memory, now) == ([b"second"] if now < 10 + TTL_S else [])


def test_a_reader_whose_clock_was_put_right_sees_again():
    memory, own = make_memory(), say(make_author("a"), at=7200.0)
    for now, wall_now, seen in ((0, 0, 0), (30, 7230, 0), (70, 7240, 1)):
        memory.begin(now)
        memory.on_list("one", [row_of(own)], now=now, wall_now=wall_now)
        claimed = memory.claim("one", now)
        memory.on_records("one", claimed, [own.record] * len(claimed), now=now, wall_now=wall_now)
        assert len(memory.living(now)) == seen


def test_who_lists_and_does_not_give_is_asked_last():
    memory = make_memory()
    told = [say(make_author(str(number))) for number in range(40)]
    memory.begin(0)
    memory.on_list("liar", [row_of(own) for own in told], now=0, wall_now=0)
    memory.on_records("liar", memory.claim("liar", 0), [], now=0, wall_now=0)
    assert not memory.claim("liar", 0)
    assert memory.find_bad(["liar"], 0) == ["liar"]


@pytest.mark.parametrize("change", [{"sequence": 0}, {"beat": bytes(16)}], ids=str)
def test_an_author_that_goes_back_makes_no_liar_of_a_holder(change):
    memory = make_memory()
    told = [say(make_author(str(number))) for number in range(10)]
    memory.begin(0)
    memory.on_list("holder", [row_of(own) for own in told], now=0, wall_now=0)
    given = [dataclasses.replace(told[0].record, **change)] + [own.record for own in told[1:]]
    memory.on_records("holder", memory.claim("holder", 0), given, now=0, wall_now=0)
    assert memory.liars == memory.silent == set()
    assert len(memory.living(0)) == 9


def test_who_withholds_what_others_told_is_not_enough():
    memory = make_memory()
    told = [say(make_author(str(number))) for number in range(40)]
    memory.begin(0)
    assert not memory.is_enough(0)
    read(memory, "one", *told, now=0)
    assert not memory.is_enough(0)  # nobody else has confirmed it
    read(memory, "two", *told[:30], now=0)
    assert not memory.is_enough(0)
    assert memory.find_bad(["one", "two", "mute"], 0) == ["two", "mute"]
    read(memory, "three", *told[:36], now=0)
    assert memory.is_enough(0)
    memory.finish(0)
    memory.begin(15)
    read(memory, "two", *told[:30], now=15)
    assert not memory.is_enough(15)
    read(memory, "one", *told, now=15)
    assert memory.is_enough(15)  # with what is remembered


def test_who_withholds_what_was_told_under_another_key_is_not_enough():
    memory = make_memory()
    told = [say(make_author(str(number))) for number in range(4)]
    memory.begin(0, {peer_digest("3"): TTL_S})
    for holder in ("one", "two"):
        read(memory, holder, *told[:3], now=0)
    assert not memory.is_enough(0)
    for holder in ("three", "four"):
        read(memory, holder, *told, now=0)
    assert memory.is_enough(0)


def test_nobody_is_forgotten_before_all_were_asked():
    memory, authors = make_memory(), [make_author(str(number)) for number in range(40)]
    memory.begin(0)
    for holder in ("one", "two"):
        read(memory, holder, *(say(author) for author in authors), now=0)
    memory.finish(0)
    for now in (15, 30, 44):
        memory.begin(now)
        told = [say(author, at=now) for author in authors]
        read(memory, "hides the last one", *told[:-1], now=now)
        assert memory.is_enough(now) == (now < TTL_S - FADING_S)
        memory.finish(now)
    assert len(memory.living(44)) == 40
    memory.on_all_asked(44)
    assert memory.is_enough(44)


def test_who_is_told_under_the_key_of_another_shard_is_passed_over():
    memory = KeyMemory(
        KEY,
        is_signed=lambda record: True,
        holds=Shard(1, 1).holds,
    )
    told = [say(make_author(str(number))) for number in range(20)]
    memory.begin(0)
    fetched = read(memory, "one", *told, now=0)
    assert 0 < len(fetched) < 20
    assert all(Shard(1, 1).holds(digest) for digest in fetched)


def test_a_flood_has_a_bound():
    memory = make_memory()
    rng = random.Random(0)
    for number in range(20):
        memory.begin(number)
        records = [make_flood(rng.randbytes(8).hex()) for _ in range(MAX_ROWS + 50)]
        rows = [Row(peer_digest(one.peer), 1, 0, 0.0, one.beat) for one in records]
        memory.on_list("flooder", rows, now=number, wall_now=number)
        while claimed := memory.claim("flooder", number):
            given = [one for one in records if peer_digest(one.peer) in claimed]
            memory.on_records("flooder", claimed, given, now=number, wall_now=number)
        assert len(memory.living(number)) == min(MAX_ROWS * (number + 1), MAX_KNOWN)


def make_flood(peer: str) -> SignedRecord:
    return SignedRecord(
        peer=peer,
        key=KEY,
        sequence=1,
        issued_at=0.0,
        ttl_s=TTL_S,
        body=b"",
        beat=BeatChain(bytes(16)).end if peer == "" else bytes(16),
        signature=b"x" * 64,
    )


def test_who_did_badly_is_asked_last_for_a_while():
    book, rng = HolderBook(), random.Random(0)
    holders = [str(number) for number in range(HOLDERS)]
    for holder, standing in {"1": Standing.LIAR, "3": Standing.LACKING, "5": Standing.LIAR}.items():
        book.note(holder, standing, 0.0)
    book.note("1", Standing.GOOD, 0.0)
    assert book.order(holders, 1.0, rng=rng)[-2:] == ["3", "5"]
    firsts = {book.order(holders, REMEMBERED_S, rng=rng)[0] for _ in range(200)}
    assert firsts == set(holders)


def test_how_many_are_asked() -> None:
    def asked(is_shard: bool, is_first: bool, is_cold: bool, trusted: int = HOLDERS) -> int:
        return asked_at_once(is_shard=is_shard, is_first=is_first, is_cold=is_cold, trusted=trusted)

    assert asked(False, True, True) == asked(False, True, False) == HOLDERS
    assert asked(False, True, True, trusted=5) == 5
    assert asked(False, True, True, trusted=0) == COLD_ASKED
    assert asked(False, False, True, trusted=5) == HOLDERS
    assert asked(True, True, True) == COLD_ASKED
    assert asked(True, True, False) == WARM_ASKED
    assert BEAT_S < 12
