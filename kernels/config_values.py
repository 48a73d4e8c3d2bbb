"""Reading single values of a ``config.json``, which are hostile: each is checked and bounded.

Standard library only. Invariant: what is returned is within the bounds that were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kernels.errors import CorruptCheckpoint

MAX_BLOCKS = 4096
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 27
MAX_EXPERTS = 256


def read_int(raw: Mapping[str, Any], key: str, most: int, *, default: int | None = None) -> int:
    """A whole number from 1 to a bound.

    Raises:
        CorruptCheckpoint: it is none, or missing without a default.
    """
    value = raw.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= most:
        raise CorruptCheckpoint(
            f"config.json says {key} = {quote(value)}; a whole number from 1 to {most} was expected"
        )
    return value


def read_float(raw: Mapping[str, Any], key: str, *, default: float) -> float:
    """A positive, finite number.

    Raises:
        CorruptCheckpoint: it is none.
    """
    value = read_optional_float(raw, key)
    return float(default) if value is None else value


def read_optional_float(raw: Mapping[str, Any], key: str) -> float | None:
    """A positive, finite number; none where the file has none.

    Raises:
        CorruptCheckpoint: it is something else.
    """
    value = raw.get(key)
    if value is None:
        return None
    # A whole number may be too large for a float.
    is_number = type(value) in (int, float) and 0 < value < 1e38 and math.isfinite(value)
    if not is_number:
        raise CorruptCheckpoint(
            f"config.json says {key} = {quote(value)}; a positive number was expected"
        )
    return float(value)


def read_bool(raw: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """True or false.

    Raises:
        CorruptCheckpoint: it is something else.
    """
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CorruptCheckpoint(
            f"config.json says {key} = {quote(value)}; true or false was expected"
        )
    return value


def read_eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text.

    Raises:
        CorruptCheckpoint: they are no token ids.
    """
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CorruptCheckpoint(
            f"config.json says eos_token_id = {quote(value)}; token ids expected"
        )
    return tuple(ids)


def quote(value: object) -> str:
    """A value from a file, short enough for an error."""
    if type(value) is int and abs(value) > 10**18:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
