"""Reading weights that are quantised already, in the forms that `stored_config` names.

Everything in a file is a stranger's: shapes, types and sizes are held against what the model's
configuration implies before anything is computed. A layer that a checkpoint left as plain numbers
is read as such.

bitsandbytes, 8 bits: ``X.weight`` int8 ``[O, I]``; ``X.SCB`` float32 ``[O]``, each row's largest
weight; ``X.weight_format``, zero.
bitsandbytes, nf4: ``X.weight`` uint8 ``[O * I / 2, 1]``; ``X.weight.absmax``, the blocks' scales,
float32 or nested, then with ``X.weight.nested_absmax`` and ``X.weight.nested_quant_map``;
``X.weight.quant_map``, the levels; ``X.weight.quant_state.bitsandbytes__nf4``, JSON.
petald: ``X.weight`` int8 ``[O, I]``, or uint8 ``[O, I / 2]`` with two codes each, the first in the
high half, eight for none; ``X.weight.scales`` float16 ``[O, I / 32]``; for uint8 perhaps
``X.weight.minima``, likewise, what a code of zero stands for.

Shapes: O width out, I width in, N blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from kernels.errors import CorruptCheckpoint, UnsupportedModel
from kernels.quant.int4 import GROUP_SIZE, MIDDLE_CODE, Int4Weights
from kernels.quant.int8 import LARGEST_CODE, Int8Weights
from kernels.quant.int8_groups import Int8GroupWeights
from kernels.quant.nf4 import (
    BLOCK_SIZE,
    LEVELS,
    SCALE_BLOCK_SIZE,
    NestedScales,
    Nf4Weights,
    PlainScales,
    dequantise_nf4,
    takes_nf4,
)
from kernels.quant.stored_config import BITSANDBYTES

Stored = Int8Weights | Int8GroupWeights | Int4Weights | Nf4Weights

MAX_STATE_BYTES = 4096
"""Of the JSON beside a 4-bit weight; bitsandbytes writes less than 200."""


class Reader(Protocol):
    """What is needed of a `kernels.checkpoint.TensorReader`."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        ...


def read_stored(
    reader: Reader, name: str, shape: tuple[int, int], *, method: str, device: torch.device
) -> Stored | torch.Tensor:
    """A layer's weight as it is stored; numbers where it is not quantised, or not by rows.

    Args:
        reader: of the checkpoint.
        name: the layer's.
        shape: that it must have.
        method: how the checkpoint is quantised.
        device: of the result.

    Raises:
        CorruptCheckpoint: something is missing, or not as it must be.
        UnsupportedModel: it is in a form that is not known here.
    """
    parts = _Parts(reader, name, shape, device)
    weight = parts.read("weight")
    if weight.is_floating_point():
        parts.check("weight", weight, weight.dtype, shape)
        return weight
    if method == BITSANDBYTES:
        return _read_nf4(parts) if weight.dtype == torch.uint8 else _read_int8(parts)
    return _read_int4(parts) if weight.dtype == torch.uint8 else _read_int8_groups(parts)


class _Parts:
    """A layer's tensors, each checked."""

    def __init__(
        self, reader: Reader, name: str, shape: tuple[int, int], device: torch.device
    ) -> None:
        self.shape = shape
        self.device = device
        self._reader = reader
        self._name = name

    def has(self, part: str) -> bool:
        return f"{self._name}.{part}" in self._reader

    def read(self, part: str) -> torch.Tensor:
        return self._reader.read(f"{self._name}.{part}").to(self.device)

    def read_checked(self, part: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        tensor = self.read(part)
        self.check(part, tensor, dtype, shape)
        return tensor

    def check(
        self, part: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise self.wrong(
                part, f"is {tensor.dtype} {list(tensor.shape)}; {dtype} {list(shape)} was expected"
            )
        if tensor.is_floating_point() and tensor.dim() < 2 and not torch.isfinite(tensor).all():
            raise self.wrong(part, "holds numbers that are infinite, or none")

    def wrong(self, part: str, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._name}.{part} {what}; fetch the model again")


def _read_int8(parts: _Parts) -> Int8Weights:
    codes_OI = parts.read_checked("weight", torch.int8, *parts.shape)
    largest_O = parts.read("SCB").float()
    parts.check("SCB", largest_O, torch.float32, (parts.shape[0],))
    if parts.has("weight_format"):
        order = parts.read("weight_format")
        if order.numel() != 1 or order.item() != 0:
            raise UnsupportedModel("8-bit weights in another order than by rows are not supported")
    return Int8Weights(codes_OI, largest_O / LARGEST_CODE)


def _read_nf4(parts: _Parts) -> Nf4Weights | torch.Tensor:
    rows, width = parts.shape
    elements = rows * width
    blocks = -(-elements // BLOCK_SIZE)
    state = _read_state(parts)
    codes = parts.read_checked("weight", torch.uint8, -(-elements // 2), 1)
    levels = parts.read_checked("weight.quant_map", torch.float32, len(LEVELS))
    if not torch.allclose(levels.cpu(), torch.tensor(LEVELS), rtol=0, atol=1e-6):
        raise parts.wrong("weight.quant_map", "does not hold the levels of nf4")
    scales: NestedScales | PlainScales
    if parts.has("weight.nested_absmax"):
        scales = NestedScales(
            parts.read_checked("weight.absmax", torch.uint8, blocks),
            parts.read_checked("weight.nested_quant_map", torch.float32, 256),
            parts.read_checked(
                "weight.nested_absmax", torch.float32, -(-blocks // SCALE_BLOCK_SIZE)
            ),
            _read_offset(parts, state),
        )
    else:
        scales = PlainScales(parts.read_checked("weight.absmax", torch.float32, blocks))
    if takes_nf4(width):
        return Nf4Weights(codes.view(rows, width // 2), scales)
    # Blocks go on from row to row: the codes of a whole number of them, and then the numbers.
    codes = F.pad(codes.flatten(), (0, blocks * BLOCK_SIZE // 2 - codes.numel()))
    numbers = dequantise_nf4(codes.view(blocks, -1), scales.read(0, blocks), torch.float32)
    return numbers.flatten()[:elements].view(rows, width)


def _read_state(parts: _Parts) -> Mapping[str, Any]:
    if parts.has("weight.quant_state.bitsandbytes__fp4"):
        raise UnsupportedModel("4-bit weights of the type fp4 are not supported; nf4 is")
    part = "weight.quant_state.bitsandbytes__nf4"
    packed = parts.read(part)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() > MAX_STATE_BYTES:
        raise parts.wrong(part, f"is {packed.dtype} {list(packed.shape)}; some bytes were expected")
    try:
        state = json.loads(bytes(packed.tolist()))
    except (ValueError, RecursionError) as error:
        raise parts.wrong(part, "is no JSON") from error
    if not isinstance(state, dict):
        raise parts.wrong(part, "is no JSON object")
    if state.get("quant_type") != "nf4" or state.get("shape") != list(parts.shape):
        raise parts.wrong(part, f"does not describe nf4 weights of {list(parts.shape)}")
    nested = state.get("nested_blocksize", SCALE_BLOCK_SIZE)
    if state.get("blocksize") != BLOCK_SIZE or nested != SCALE_BLOCK_SIZE:
        raise UnsupportedModel(
            f"nf4 weights are supported in blocks of {BLOCK_SIZE}, nested in {SCALE_BLOCK_SIZE}; "
            f"these are in {state.get('blocksize')!r:.20}, nested in {nested!r:.20}"
        )
    return state


def _read_offset(parts: _Parts, state: Mapping[str, Any]) -> torch.Tensor:
    offset = state.get("nested_offset")
    number = torch.tensor(offset if isinstance(offset, float) else math.nan, dtype=torch.float32)
    if not torch.isfinite(number):
        raise parts.wrong("weight.quant_state", f"has the offset {offset!r:.40}; a number was due")
    return number.to(parts.device)


def _read_int4(parts: _Parts) -> Int4Weights:
    rows, width = parts.shape
    codes_OI = parts.read_checked("weight", torch.uint8, rows, width // 2)
    scales_OG = _read_groups(parts, "weight.scales")
    if parts.has("weight.minima"):
        centres_OG = _read_groups(parts, "weight.minima") + MIDDLE_CODE * scales_OG
    else:
        centres_OG = torch.zeros_like(scales_OG)
    return Int4Weights(codes_OI, scales_OG, centres_OG)


def _read_int8_groups(parts: _Parts) -> Int8GroupWeights:
    codes_OI = parts.read_checked("weight", torch.int8, *parts.shape)
    return Int8GroupWeights(codes_OI, _read_groups(parts, "weight.scales"))


def _read_groups(parts: _Parts, part: str) -> torch.Tensor:
    rows, width = parts.shape
    if width % GROUP_SIZE:
        raise parts.wrong(part, f"has groups of {GROUP_SIZE} in rows of {width}")
    numbers_OG = parts.read_checked(part, torch.float16, rows, width // GROUP_SIZE)
    if not torch.isfinite(numbers_OG).all():
        raise parts.wrong(part, "holds numbers that are infinite, or none")
    return numbers_OG.float()
