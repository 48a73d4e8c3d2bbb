"""The weight formats by name: what a server may be told to hold its blocks' weights in.

Norms, biases, embeddings, heads and routers are never among them. A layer whose shape a format
does not take stays in the dtype of the span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kernels.errors import UnknownWeightFormat
from kernels.quant.int8 import Int8Weights, join_int8, quantise_int8
from kernels.quant.matrix import QuantisedMatrix

UNQUANTISED = "none"


class StoredWeights(Protocol):
    """A matrix ``[O, I]`` in few bits, as checkpoints and quantisers give it."""

    @property
    def shape(self) -> tuple[int, int]:
        """Width out and width in."""
        ...

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers, ``[O, I]``; plain, and what the placed matrix is held against."""
        ...

    def place(self, dtype: torch.dtype) -> QuantisedMatrix:
        """The matrix that computes in a dtype, on the same device."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """A way of holding a matrix in few bits.

    Attributes:
        kind: the class of its stored weights.
        fits: whether it takes a matrix of this width in.
        quantise: makes stored weights of numbers, for activations of a dtype.
        join: puts several of one width in side by side.
        bytes_per_weight: about; for what is planned before anything is read.
    """

    kind: type
    fits: Callable[[int], bool]
    quantise: Callable[[torch.Tensor, torch.dtype], Any]
    join: Callable[[Sequence[Any]], StoredWeights]
    bytes_per_weight: float


FORMATS: dict[str, WeightFormat] = {
    "int8": WeightFormat(
        kind=Int8Weights,
        fits=lambda _: True,
        quantise=quantise_int8,
        join=join_int8,
        bytes_per_weight=1.0,
    ),
}

WEIGHT_FORMATS = (UNQUANTISED, *FORMATS)
"""All names."""


def check_weight_format(name: str) -> None:
    """Refuses a name that stands for none.

    Raises:
        UnknownWeightFormat: it does.
    """
    if name not in WEIGHT_FORMATS:
        raise UnknownWeightFormat(
            f"weights cannot be held as {name!r}; the formats are: {', '.join(WEIGHT_FORMATS)}"
        )


def format_of(weights: StoredWeights) -> WeightFormat:
    """The format that stored weights are in."""
    return next(form for form in FORMATS.values() if isinstance(weights, form.kind))
