"""The values of command line options, read with a sentence for what is wrong with them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

MAX_STOP_CHARACTERS = 256
MAX_STOPS = 16


def number(
    *, least: float, most: float | None = None, is_least_allowed: bool = True
) -> Callable[[str], float]:
    """Reads a number within the limits."""
    sign = "at least" if is_least_allowed else "more than"
    limits = f"{sign} {least:g}" + (f" and at most {most:g}" if most is not None else "")

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        is_within = value >= least if is_least_allowed else value > least
        if not math.isfinite(value) or not is_within or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {limits}")
        return value

    return read


def whole_number(*, least: int, most: int = 2**31) -> Callable[[str], int]:
    """Reads a whole number within the limits."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not a whole number of at least {least} and at most {most}"
            )
        return value

    return read


def stop_text(text: str) -> str:
    """Reads a text that ends an answer; backslash-n is a newline, backslash-t a tab."""
    value = text.replace("\\n", "\n").replace("\\t", "\t")
    if not 1 <= len(value) <= MAX_STOP_CHARACTERS:
        raise argparse.ArgumentTypeError(
            f"a stop text has 1 to {MAX_STOP_CHARACTERS} characters, not {len(value)}"
        )
    return value
