"""Spans in few bits, and the dense ones that they must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from kernels.checkpoint import Checkpoint
from kernels.layer_loader import LayerLoader
from kernels.linear import DenseLinear, Linear
from kernels.quant.linear import QuantisedLinear
from kernels.quant.matrix import dequantise
from kernels.span import Span, load_span

CPU = torch.device("cpu")


@contextmanager
def dequantised_layers() -> Iterator[list[str]]:
    """While it lasts, layers that are made in few bits are written out as dense ones.

    Gives the names of their first parts.
    """
    make = LayerLoader.make_linear
    names_made: list[str] = []

    def make_dense(self: LayerLoader, names: Sequence[str]) -> Linear:
        layer = make(self, names)
        if not isinstance(layer, QuantisedLinear):
            return layer
        names_made.append(names[0])
        parts = [(name.rpartition(".")[2], self._shapes[f"{name}.weight"][0]) for name in names]
        return DenseLinear(dequantise(layer.matrix, self._dtype), layer.bias_O, parts=parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerLoader, "make_linear", make_dense)
        yield names_made


def load_both(
    checkpoint: Checkpoint,
    *,
    quant: str,
    dtype: torch.dtype,
    start: int = 0,
    end: int | None = None,
    device: torch.device = CPU,
) -> tuple[Span, Span]:
    """A span in a weight format, and a dense one with the same weights."""
    end = checkpoint.config.num_blocks if end is None else end
    span = load_span(checkpoint, start, end, dtype=dtype, device=device, quant=quant)
    with dequantised_layers() as names:
        dense = load_span(checkpoint, start, end, dtype=dtype, device=device, quant=quant)
    assert names, "no layer of the span is in few bits"
    return span, dense
