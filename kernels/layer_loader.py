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
    StoredWeights,
    check_weight_format,
    join_stored,
    quantise_parts,
)
from kernels.quant.linear import QuantisedLinear
from kernels.quant.stored import read_stored
from kernels.quant.stored_config import StoredQuantisation
from kernels.weight_names import block_shapes, layer_weights, short_name


class LayerLoader(Mapping[str, torch.Tensor]):
    """A block's tensors by name, each read when it is asked for, and its layers.

    Args:
        reader: of the checkpoint.
        shapes: of the block's tensors.
        quant: name of the format that layers are made in.
        stored: how the checkpoint's weights are quantised already; none: they are numbers.
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
        stored: StoredQuantisation | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_weight_format(quant)
        self._reader = reader
        self._shapes = shapes
        self._quant = quant
        self._stored = stored
        self._dtype = dtype
        self._device = device

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        stem, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) != 2:
            return self._reader.read_numbers(name, shape).to(self._device, self._dtype)
        return self._as_numbers(self._read(stem), self._dtype)

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
        """The layer's weights in few bits; none where they are to be plain numbers.

        What the checkpoint has in the wanted format stays as it is, bit for bit, and so does
        whatever it has where none is wanted. Everything else becomes numbers first, a part of the
        layer at a time.
        """
        width = self._shapes[f"{names[0]}.weight"][1]
        form = FORMATS.get(self._quant)
        if self._stored is not None:
            read = [self._read(name) for name in names]
            kinds = {type(part) for part in read}
            is_one_kind = len(kinds) == 1 and not isinstance(read[0], torch.Tensor)
            if is_one_kind and (form is None or form.kind in kinds):
                return join_stored(read)  # type: ignore[arg-type]
            del read
        if form is None or not form.fits(width):
            return None
        numbers = (self._as_numbers(self._read(name)) for name in names)
        return quantise_parts(self._quant, numbers, self._dtype)

    def _read(self, name: str) -> StoredWeights | torch.Tensor:
        """A layer's weight as its file has it, on the device."""
        full_name = f"{name}.weight"
        shape = self._shapes[full_name]
        if self._stored is None:
            return self._reader.read_numbers(full_name, shape).to(self._device)
        return read_stored(
            self._reader,
            name,
            (shape[0], shape[1]),
            method=self._stored.method,
            device=self._device,
        )

    def _as_numbers(
        self, weight: StoredWeights | torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """In a dtype; by default in that of the file, and where it has none, in float32."""
        if isinstance(weight, torch.Tensor):
            return weight if dtype is None else weight.to(dtype)
        return weight.dequantise(dtype or torch.float32)


def block_bytes(
    config: ModelConfig,
    block: int,
    *,
    dtype: torch.dtype,
    quant: str,
    stored: StoredQuantisation | None = None,
) -> int:
    """The memory that a block's weights will take, about.

    Args:
        config: of the model.
        block: its number.
        dtype: of what is not quantised.
        quant: name of the format of the layers.
        stored: how the checkpoint itself is quantised; none where it is not.
    """
    shapes = block_shapes(config, block)
    elements = sum(math.prod(shape) for shape in shapes.values())
    layers = [shapes[name] for name in layer_weights(config, block)]
    form = FORMATS.get(quant)
    if form is not None:
        layers = [shape for shape in layers if form.fits(shape[1])]
        weight_bytes = form.bytes_per_weight
    else:
        weight_bytes = dtype.itemsize if stored is None else stored.bytes_per_weight
    quantised = sum(math.prod(shape) for shape in layers)
    return round(quantised * weight_bytes) + (elements - quantised) * dtype.itemsize
