"""How fast a connection is held to be."""

from p2p.bandwidth import FIRST_VALUE, KEPT, LEAST_BYTES, Bandwidth


def measure(bandwidth: Bandwidth, size_bytes: int, seconds: float, at: float = 100.0) -> None:
    values = bandwidth.on_write(size_bytes)
    assert values is not None
    bandwidth.on_pong(values[0], at)
    bandwidth.on_pong(values[1], at + seconds)


def test_a_small_write_tells_nothing() -> None:
    bandwidth = Bandwidth()
    assert bandwidth.on_write(LEAST_BYTES - 1) is None
    assert bandwidth.bytes_per_s is None


def test_the_time_between_the_answers_counts() -> None:
    bandwidth = Bandwidth()
    measure(bandwidth, 100_000, 0.1)
    assert bandwidth.bytes_per_s is not None
    assert round(bandwidth.bytes_per_s) == 1_000_000


def test_one_write_is_measured_at_a_time_and_pongs_of_others_do_not_count() -> None:
    bandwidth = Bandwidth()
    values = bandwidth.on_write(100_000)
    assert values is not None
    assert min(values) >= FIRST_VALUE
    assert bandwidth.on_write(100_000) is None
    bandwidth.on_pong(values[1], 1.0)  # before the first one's: a lie
    bandwidth.on_pong(7, 1.0)
    assert bandwidth.bytes_per_s is None
    bandwidth.on_pong(values[0], 2.0)
    bandwidth.on_pong(values[1], 2.5)
    assert bandwidth.bytes_per_s == 200_000
    assert bandwidth.on_write(100_000) not in (None, values)


def test_the_median_of_the_last_few_counts() -> None:
    bandwidth = Bandwidth()
    for seconds in (1.0, 1.0, 0.001, 50.0, 1.0):
        measure(bandwidth, 100_000, seconds)
    assert bandwidth.bytes_per_s == 100_000
    for _ in range(KEPT):
        measure(bandwidth, 100_000, 0.5)
    assert bandwidth.bytes_per_s == 200_000


def test_answers_at_one_moment_are_no_division_by_zero() -> None:
    bandwidth = Bandwidth()
    measure(bandwidth, 100_000, 0.0)
    assert bandwidth.bytes_per_s is not None
