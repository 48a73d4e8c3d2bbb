"""How many blocks fit, and how people write which."""

import pytest

from petald.errors import ConfigError
from petald.placement import count_fitting_blocks, parse_blocks


@pytest.mark.parametrize(("text", "span"), [("0:10", (0, 10)), ("3:4", (3, 4))])
def test_blocks_are_read(text: str, span: tuple[int, int]) -> None:
    assert parse_blocks(text) == span


@pytest.mark.parametrize("text", ["", ":", "1", "1:", ":2", "2:1", "3:3", "-1:2", "a:b", "1:2:3"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="START:END"):
        parse_blocks(text)


def test_blocks_that_fit_are_counted() -> None:
    sizes = [100, 100, 100, 100]
    assert count_fitting_blocks(sizes, memory_bytes=399) == 3
    assert count_fitting_blocks([200] * 4, memory_bytes=400) == 2
    assert count_fitting_blocks([200] * 4, memory_bytes=199) == 0
    assert count_fitting_blocks(sizes, memory_bytes=10**9) == 4
