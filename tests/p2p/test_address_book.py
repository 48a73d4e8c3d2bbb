"""What is known of peers' addresses, who said it, and for how long."""

from __future__ import annotations

from p2p import address_book
from p2p.address_book import MAX_ADDRESSES, MAX_HINTS, AddressBook, Source

A, B, C = (f"/ip4/192.0.2.{number}/tcp/4001" for number in (1, 2, 3))


def many(count: int) -> list[str]:
    return [f"/ip4/198.51.100.{number}/tcp/1" for number in range(count)]


def add(book: AddressBook, source: Source, *addresses: str, now: float = 0.0) -> None:
    book.add("peer", addresses, source, now=now, ttl_s=10.0)


def test_a_peers_own_word_replaces_the_one_before_and_all_hints():
    book = AddressBook()
    add(book, Source.HINT, C)
    add(book, Source.DIRECTORY, A, B)
    assert book.get("peer", now=1.0) == (A, B)
    add(book, Source.DIRECTORY, C)
    assert book.get("peer", now=1.0) == (C,)


def test_what_others_say_comes_last_whenever_it_is_said():
    book = AddressBook()
    for source in (Source.HINT, Source.RECORD, Source.DIRECTORY, Source.HINT):
        add(book, source, {Source.HINT: C, Source.RECORD: B, Source.DIRECTORY: A}[source])
    assert book.get("peer", now=1.0) == (A, B, C)


def test_of_hints_the_newest_come_first():
    book = AddressBook()
    for hint in (A, B, A):
        add(book, Source.HINT, hint)
    assert book.get("peer", now=1.0) == (A, B)
    add(book, Source.HINT, *many(50))
    assert book.get("peer", now=1.0) == tuple(many(MAX_HINTS))
    book.forget_hints("peer")
    assert book.get("peer", now=1.0) == ()


def test_hints_do_not_make_a_peers_own_word_last_longer():
    book = AddressBook()
    add(book, Source.DIRECTORY, A, now=0.0)
    add(book, Source.HINT, B, now=9.0)
    assert book.get("peer", now=9.9) == (A, B)
    assert book.get("peer", now=10.0) == (B,)


def test_what_cannot_be_dialled_changes_nothing():
    book = AddressBook()
    add(book, Source.DIRECTORY, A)
    add(book, Source.DIRECTORY, "", "nonsense", "/ip4/0.0.0.0/tcp/1", "/ip4/192.0.2.1/udp/1/quic")
    add(book, Source.DIRECTORY)
    assert book.get("peer", now=1.0) == (A,)


def test_each_table_is_bounded(monkeypatch):
    monkeypatch.setattr(address_book, "MAX_PEERS", 3)
    book = AddressBook()
    add(book, Source.DIRECTORY, *many(100))
    for number in range(10):
        for source in (Source.HINT, Source.RECORD):
            book.add(f"stranger {number}", [A], source, now=0.0, ttl_s=10.0)
    assert book.get("peer", now=1.0) == tuple(many(MAX_ADDRESSES))
    assert [bool(book.get(f"stranger {each}", now=1.0)) for each in range(10)].count(True) == 3
