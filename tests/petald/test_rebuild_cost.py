"""Whether a hop is sooner rebuilt by replay, or from the old hop's cache."""

from petald.rebuild_cost import RebuildCost


def make_cost(token_s: float, round_trip_s: float) -> RebuildCost:
    return RebuildCost(
        token_s=token_s,
        row_bytes=4 * 576,
        cache_bytes=2 * 4 * 192 * 10,
        client_round_trip_s=round_trip_s,
        round_trip_s=round_trip_s,
    )


def test_a_near_cache_comes_sooner_than_it_is_computed() -> None:
    cost = make_cost(token_s=0.001, round_trip_s=0.001)
    assert cost.hand_over_s(1000) < cost.replay_s(1000)


def test_a_cache_is_not_sent_through_a_home_link_where_a_replay_is_quick() -> None:
    cost = make_cost(token_s=0.001, round_trip_s=0.05)
    assert cost.replay_s(1000) < cost.hand_over_s(1000)


def test_a_slow_machine_rather_waits_for_the_cache() -> None:
    cost = make_cost(token_s=0.1, round_trip_s=0.05)
    assert cost.hand_over_s(1000) < cost.replay_s(1000)
