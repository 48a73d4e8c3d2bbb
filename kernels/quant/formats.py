"""The weight formats by name: what a server may be told to hold its blocks' weights in.

Norms, biases, embeddings, heads and routers are never among them. A layer whose shape a format
does not take stays in the dtype of the span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kernels.errors import UnknownWeightFormat
from kernels.quant.int4 import Int4Weights, join_int4, quantise_int4, takes_int4
from kernels.quant.int4_order import find_order
from kernels.quant.int8 import Int8Weights, join_int8, quantise_int8
from kernels.quant.int8_groups import Int8GroupWeights, join_int8_groups
from kernels.quant.matrix import QuantisedMatrix
from kernels.quant.nf4 import Nf4Weights, join_nf4, nest_scales, quantise_nf4, takes_nf4
from kernels.quant.nf4_matrix import has_cpu_kernel

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
        finish: what remains to be done when weights that were quantised here are joined.
        bytes_per_weight: about; for what is planned before anything is read.
    """

    kind: type
    fits: Callable[[int], bool]
    quantise: Callable[[torch.Tensor, torch.dtype], Any]
    join: Callable[[Sequence[Any]], StoredWeights]
    finish: Callable[[Any], StoredWeights] = lambda joined: joined
    bytes_per_weight: float


FORMATS: dict[str, WeightFormat] = {
    "int8": WeightFormat(
        kind=Int8Weights,
        fits=lambda _: True,
        quantise=quantise_int8,
        join=join_int8,
        bytes_per_weight=1.0,
    ),
    "nf4": WeightFormat(
        kind=Nf4Weights,
        fits=takes_nf4,
        quantise=quantise_nf4,
        join=join_nf4,
        finish=nest_scales,
        bytes_per_weight=0.52,
    ),
    "int4": WeightFormat(
        kind=Int4Weights,
        fits=takes_int4,
        quantise=quantise_int4,
        join=join_int4,
        bytes_per_weight=0.625,
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


def join_stored(parts: Sequence[StoredWeights]) -> StoredWeights:
    """Several matrices of one kind and of one width in, side by side."""
    return _JOINS[type(parts[0])](parts)


_JOINS: dict[type, Callable[[Sequence[Any]], StoredWeights]] = {
    Int8GroupWeights: join_int8_groups,
    **{form.kind: form.join for form in FORMATS.values()},
}


def quantise_parts(name: str, parts: Iterable[torch.Tensor], dtype: torch.dtype) -> StoredWeights:
    """One matrix in a format, of several that stand side by side; each is forgotten in its turn.

    Args:
        name: of the format; it fits the width.
        parts: the matrices' numbers.
        dtype: of the activations.
    """
    form = FORMATS[name]
    return form.finish(form.join([form.quantise(part, dtype) for part in parts]))


def why_slow(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why a format's decode steps are slower here than dense ones; empty where they are not.

    A sentence for the user of the machine, with what to do.
    """
    if name == UNQUANTISED:
        return ""
    if device.type != "cpu":
        return "int4 weights are slow on a GPU; choose nf4" if name == "int4" else ""
    if dtype != torch.bfloat16:
        return f"{name} weights are fast on a CPU in bfloat16 alone; set dtype to bfloat16"
    if name == "nf4" and not has_cpu_kernel():
        return (
            "nf4 weights are slow on a CPU without AVX512-BF16, or without bitsandbytes; "
            "choose int8 or int4"
        )
    if name == "int4" and not find_order().is_torchs:
        return "int4 weights are slow on this CPU; choose int8"
    return ""
