"""GGUF's simplest quantised blocks, taken apart into codes and scales, bit for bit.

Q8_0, Q4_0 and Q4_1 have 32 weights in a block, with one scale, and for Q4_1 the least weight; that
is what `kernels.quant` multiplies with as it is (the form is described in `kernels.quant.stored`).
All others would lose something on the way, and become numbers.

Source: ``block_q8_0``, ``block_q4_0`` and ``block_q4_1`` in ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockForm:
    """How a block is laid out: float16 numbers, and then its codes.

    Attributes:
        numbers: what they are, by the suffix of their tensor's name.
        code_bits: 8, signed; or 4, of which the first 16 are in the bytes' low halves.
    """

    numbers: tuple[str, ...]
    code_bits: int

    @property
    def block_bytes(self) -> int:
        """The size of a block, which taking it apart does not change."""
        return 2 * len(self.numbers) + BLOCK_SIZE * self.code_bits // 8


KEPT_FORMS: Mapping[str, BlockForm] = {
    "Q8_0": BlockForm(numbers=(".scales",), code_bits=8),
    "Q4_0": BlockForm(numbers=(".scales",), code_bits=4),
    "Q4_1": BlockForm(numbers=(".scales", ".minima"), code_bits=4),
}


def take_apart(form: BlockForm, packed: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Codes and numbers of some rows, by the suffixes of their tensors' names.

    Args:
        form: of the blocks.
        packed: their bytes, row after row.
    """
    rows = len(packed)
    blocks = np.ascontiguousarray(packed).view(np.uint8).reshape(rows, -1, form.block_bytes)
    head = 2 * len(form.numbers)
    parts: dict[str, npt.NDArray[Any]] = {}
    for place, suffix in enumerate(form.numbers):
        number = np.ascontiguousarray(blocks[..., 2 * place : 2 * place + 2])
        parts[suffix] = number.view(np.float16)[..., 0]
    codes = blocks[..., head:]
    if form.code_bits == 8:
        return {"": np.ascontiguousarray(codes).view(np.int8).reshape(rows, -1), **parts}
    in_order = np.concatenate((codes & 0xF, codes >> 4), axis=-1)
    pairs = (in_order[..., ::2] << 4) | in_order[..., 1::2]
    return {"": np.ascontiguousarray(pairs).reshape(rows, -1), **parts}
