"""For how long a server is believed to be there."""

from petald.known_servers import Heard, KnownServers
from petald.swarm import Announcement, ServerState


def heard(peer: str, sequence: int, at: float, step_ms: float = 1.0) -> Heard:
    announcement = Announcement(
        model=bytes(32),
        start=0,
        end=4,
        state=ServerState.SERVING,
        step_ms=step_ms,
        cache_tokens=10,
        free_cache_tokens=10,
        dtype="float32",
    )
    return Heard(peer=peer, sequence=sequence, announcement=announcement, heard_at=at)


def peers(known: tuple[Heard, ...]) -> dict[str, float]:
    return {one.peer: one.announcement.step_ms for one in known}


def test_one_lookup_that_misses_a_server_does_not_forget_it() -> None:
    known = KnownServers(ttl_s=45)
    known.take([heard("a", 1, 0), heard("b", 1, 0)], 0)
    assert peers(known.take([heard("a", 2, 10, 2.0)], 10)) == {"a": 2.0, "b": 1.0}
    assert peers(known.take([], 45)) == {"a": 2.0, "b": 1.0}
    assert peers(known.take([], 46)) == {"a": 2.0}


def test_an_old_announcement_that_is_told_again_is_not_news() -> None:
    known = KnownServers(ttl_s=45)
    known.take([heard("a", 5, 0, 5.0)], 0)
    # A holder that repeats it for ever keeps nobody alive, and an older one changes nothing.
    assert peers(known.take([heard("a", 4, 20, 4.0)], 20)) == {"a": 5.0}
    known.take([heard("a", 5, 40, 5.0)], 40)
    assert peers(known.take([heard("a", 5, 46, 5.0)], 45)) == {"a": 5.0}
    assert peers(known.take([], 46)) == {}
