"""Making a block's linear layers of what its checkpoint has, in the weight format that is wanted.

One layer at a time: its weights are read from the mapped file, quantised and forgotten, so that a
span in few bits never stands in memory in many. Invariant: no more than one layer's weights are
held in another form than the span's.

Shapes: I width in, O width out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from kernels.checkpoint import TensorReader
from kernels.linear import DenseLinear, Linear
from kernels.model_config import ModelConfig
from kernels.quant.formats import (
    FORMATS,
    UNQUANTISED,
    StoredWeights,
    check_weight_format,
    quantise_parts,
)
from kernels.quant.linear import QuantisedLinear
from kernels.weight_names import block_shapes, layer_weights, short_name


class LayerLoader(Mapping[str, torch.Tensor]):
    """A block's tensors by name, each read when it is asked for, and its layers.

    Args:
        reader: of the checkpoint.
        shapes: of the block's tensors.
        quant: name of the format that layers are made in.
        dtype: of everything else.
        device: of the result.

    Raises:
        UnknownWeightFormat: there is no such format.
    """

    def __init__(
        self,
        reader: TensorReader,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        quant: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_weight_format(quant)
        self._reader = reader
        self._shapes = shapes
        self._quant = quant
        self._dtype = dtype
        self._device = device

    def __getitem__(self, name: str) -> torch.Tensor:
        numbers = self._reader.read_numbers(name, self._shapes[name])
        return numbers.to(device=self._device, dtype=self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def make_linear(self, names: Sequence[str]) -> Linear:
        """One layer of those that have these names, side by side.

        Args:
            names: in the checkpoint, without ``.weight``.

        Raises:
            CorruptCheckpoint: a tensor is missing or not as it must be.
        """
        shapes = [self._shapes[f"{name}.weight"] for name in names]
        parts = [(short_name(name), shape[0]) for name, shape in zip(names, shapes, strict=True)]
        biases = [self[f"{name}.bias"] for name in names if f"{name}.bias" in self]
        bias_O = torch.cat(biases) if biases else None
        stored = self._store(names)
        if stored is None:
            weight_OI = torch.cat([self[f"{name}.weight"] for name in names])
            return DenseLinear(weight_OI, bias_O, parts=parts)
        return QuantisedLinear(stored.place(self._dtype), bias_O, parts=parts)

    def _store(self, names: Sequence[str]) -> StoredWeights | None:
        """The layer's weights in few bits; none where they are to be plain numbers."""
        width = self._shapes[f"{names[0]}.weight"][1]
        if self._quant == UNQUANTISED or not FORMATS[self._quant].fits(width):
            return None
        return quantise_parts(self._quant, map(self._read, names), self._dtype)

    def _read(self, name: str) -> torch.Tensor:
        """A weight as its file has it, on the device."""
        full_name = f"{name}.weight"
        return self._reader.read_numbers(full_name, self._shapes[full_name]).to(self._device)


def block_bytes(config: ModelConfig, block: int, *, dtype: torch.dtype, quant: str) -> int:
    """The memory that a block's weights will take, about.

    Args:
        config: of the model.
        block: its number.
        dtype: of what is not quantised.
        quant: name of the format of the layers; a checkpoint that is quantised itself takes less.
    """
    shapes = block_shapes(config, block)
    elements = sum(math.prod(shape) for shape in shapes.values())
    if quant == UNQUANTISED:
        return elements * dtype.itemsize
    form = FORMATS[quant]
    layers = [shapes[name] for name in layer_weights(config, block)]
    quantised = sum(math.prod(shape) for shape in layers if form.fits(shape[1]))
    return round(quantised * form.bytes_per_weight) + (elements - quantised) * dtype.itemsize
