"""How far a peer is held to be."""

from p2p.round_trips import KEPT, MAX_PEERS, RoundTrips


def test_one_slow_answer_makes_no_peer_far() -> None:
    trips = RoundTrips()
    for seconds in (0.010, 0.300, 0.012):
        trips.add("a", seconds)
    assert trips.get("a") == 0.010
    assert trips.get("b") is None


def test_a_way_that_became_longer_is_known_after_a_while() -> None:
    trips = RoundTrips()
    trips.add("a", 0.010)
    for _ in range(KEPT):
        trips.add("a", 0.200)
    assert trips.get("a") == 0.200


def test_the_peer_measured_longest_ago_is_forgotten_first() -> None:
    trips = RoundTrips()
    for number in range(MAX_PEERS):
        trips.add(str(number), 1.0)
    trips.add("0", 1.0)
    trips.add("new", 1.0)
    assert trips.get("0") == 1.0
    assert trips.get("1") is None
