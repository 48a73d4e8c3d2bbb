"""How hidden states are written as bytes, row by row.

Every row is encoded by itself, and a row's bytes depend on nothing but the row: so encoded rows can
be cut and joined as bytes, and a history that was kept as it came decodes to the same bits,
however its rows are grouped later. Nothing here knows the wire.

Shapes: S rows, D hidden size, R bytes of an encoded row, G groups of a row.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kernels.errors import UnknownCodec

GROUP_VALUES = 64
"""Values that share a scale in `Int8Codec`: a 16-bit scale for 64 values costs 3 % of the bytes,
and an outlier spoils the resolution of its 63 neighbours only."""

_SMALLEST_SCALE = 2.0**-24
"""The least that float16 holds, in which scales are written. One too large for it becomes infinite,
and so do the values: whoever decodes them sees that they are not finite."""


class Codec(Protocol):
    """One way to write rows.

    Attributes:
        is_lossy: what is decoded is not what was encoded.
    """

    name: str
    is_lossy: bool

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """How many bytes each row takes."""

    def encode(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Rows as bytes, ``[S, R]`` uint8, on the CPU; may share the input's memory."""

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows, ``[S, D]`` in ``dtype``; may share the input's memory.

        Args:
            data_SR: uint8, with as many bytes to a row as `row_bytes` says; not written to.
            hidden_size: D.
            dtype: of the values that were encoded.
        """


class RawCodec:
    """Each value as it is in memory, little-endian."""

    name = "raw"
    is_lossy = False

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """How many bytes each row takes."""
        return hidden_size * dtype.itemsize

    def encode(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Rows as bytes."""
        return hidden_SD.detach().cpu().contiguous().view(torch.uint8)

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows."""
        if data_SR.data_ptr() % dtype.itemsize or not data_SR.is_contiguous():
            data_SR = data_SR.clone(memory_format=torch.contiguous_format)
        return data_SR.view(dtype)


class Int8Codec:
    """Eight bits for each value, scaled by the largest of its group.

    Block-wise absolute maxima are those of section 2.1 of "8-bit Optimizers via Block-wise
    Quantization" (Dettmers et al., 2021), here with steps of equal size. A row is its groups'
    scales in float16, then its values in int8. The last group is shorter where the hidden size is
    no multiple of `GROUP_VALUES`.
    """

    name = "int8"
    is_lossy = True

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """How many bytes each row takes."""
        return 2 * _groups(hidden_size) + hidden_size

    def encode(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Rows as bytes."""
        rows_SD = hidden_SD.detach().to(torch.float32)
        count, hidden_size = rows_SD.shape
        groups = _groups(hidden_size)
        padded = torch.nn.functional.pad(rows_SD, (0, groups * GROUP_VALUES - hidden_size))
        grouped = padded.view(count, groups, GROUP_VALUES)
        scale_SG = (grouped.abs().amax(dim=2) / 127).clamp_min(_SMALLEST_SCALE).to(torch.float16)
        steps = grouped / scale_SG.to(torch.float32)[:, :, None]
        codes = steps.round_().clamp_(-127, 127).to(torch.int8).view(count, -1)[:, :hidden_size]
        parts = (scale_SG.view(torch.uint8).view(count, 2 * groups), codes.view(torch.uint8))
        return torch.cat(parts, dim=1).cpu()

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows."""
        groups = _groups(hidden_size)
        scale_SG = data_SR[:, : 2 * groups].contiguous().view(torch.float16).to(torch.float32)
        codes_SD = data_SR[:, 2 * groups :].contiguous().view(torch.int8).to(torch.float32)
        scale_SD = scale_SG.repeat_interleave(GROUP_VALUES, dim=1)[:, :hidden_size]
        return (codes_SD * scale_SD).to(dtype)


def _groups(hidden_size: int) -> int:
    return -(-hidden_size // GROUP_VALUES)


_CODECS: dict[str, Codec] = {codec.name: codec for codec in (RawCodec(), Int8Codec())}

CODEC_NAMES = tuple(_CODECS)


def find_codec(name: str) -> Codec:
    """The codec of a name.

    Raises:
        UnknownCodec: there is none.
    """
    codec = _CODECS.get(name)
    if codec is None:
        raise UnknownCodec(f"the codec {name[:32]!r} is not known; there are {', '.join(_CODECS)}")
    return codec
