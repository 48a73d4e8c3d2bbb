"""Which codec a message goes in."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from p2p.wire.tensor import RAW
from petald.codec_choice import (
    AUTO_CODECS,
    LEAST_GAIN_S,
    TYPICAL_COSTS,
    UNKNOWN_BYTES_PER_S,
    Candidate,
    choose_codec,
)


def message(rows: int, width: int = 4096, value_bytes: int = 2) -> list[Candidate]:
    values = rows * width
    sizes = {RAW: values * value_bytes, "int8": values + values // 32}
    return [
        Candidate(name, sizes[name], TYPICAL_COSTS[name].seconds(values)) for name in AUTO_CODECS
    ]


def test_a_home_connection_gets_everything_encoded() -> None:
    for rows in (1, 16, 512):
        assert choose_codec(message(rows), 1.25e6) == "int8"


def test_a_loopback_gets_nothing_encoded() -> None:
    for rows in (1, 16, 512):
        assert choose_codec(message(rows), 1e9) == RAW


def test_between_them_a_long_message_is_encoded_and_a_row_is_not() -> None:
    rate = 40e6
    assert choose_codec(message(1), rate) == RAW
    assert choose_codec(message(512), rate) == "int8"


def test_an_unknown_link_is_held_to_be_a_home_connection() -> None:
    for rows in (1, 512):
        assert choose_codec(message(rows), None) == choose_codec(message(rows), UNKNOWN_BYTES_PER_S)


def test_a_link_that_carries_nothing_is_no_division_by_zero() -> None:
    assert choose_codec(message(1), 0.0) == "int8"


@given(
    rows=st.integers(1, 2000),
    width=st.sampled_from([1, 64, 576, 8192]),
    value_bytes=st.sampled_from([2, 4]),
    rate=st.floats(1e3, 1e11) | st.just(math.inf),
)
def test_what_is_chosen_is_never_later_than_raw(
    rows: int, width: int, value_bytes: int, rate: float
) -> None:
    candidates = message(rows, width, value_bytes)
    times = {each.name: each.size_bytes / rate + each.cost_s for each in candidates}
    chosen = choose_codec(candidates, rate)
    if chosen != RAW:
        assert times[chosen] <= times[RAW] - LEAST_GAIN_S
