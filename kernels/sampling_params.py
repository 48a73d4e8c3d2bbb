"""How the next token is chosen: the values, checked. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.errors import BadSampling

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """The defaults are greedy.

    Attributes:
        temperature: 0 takes the likeliest token; 1 samples as the model says.
        top_k: keeps so many likeliest tokens; 0 keeps all.
        top_p: keeps the likeliest tokens that together have this probability; 1 keeps all.
        min_p: drops tokens less likely than this share of the likeliest; 0 drops none.
        repetition_penalty: over 1, tokens that stand in the text already become less likely.
        seed: makes the choice repeatable; none for chance.

    Raises:
        BadSampling: a value is outside of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "0 to 100")
        _check("top_k", self.top_k, 0 <= self.top_k <= 2**31, "0 (all) or more")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "over 0, up to 1")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 to 1")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            0.01 <= self.repetition_penalty <= 100.0,
            "0.01 to 100",
        )
        if self.seed is not None:
            _check("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}")


def _check(name: str, value: float, is_in_range: bool, expected: str) -> None:
    if not math.isfinite(value) or not is_in_range:
        raise BadSampling(f"{name} is {value}; it must be {expected}")
