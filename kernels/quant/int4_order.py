"""The order in which torch's 4-bit product on a CPU reads codes.

Blocks of rows stand together; within one, each column is as many bytes as half of the rows, and a
byte has the codes of two rows. How many rows, and which two, depends on the instructions that torch
finds in the CPU: so it is tried out once. Where the order is none of those that are known, ours is
kept and torch's product is not used.

Shapes: O rows of the matrix, a multiple of 64; I its width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

ROW_STEP = 64
"""The rows are padded to a multiple of so many: the largest block of any order."""


@dataclass(frozen=True, slots=True)
class CodeOrder:
    """An order of codes.

    Attributes:
        block: so many rows stand together.
        is_split: whether a byte has a row of the first half, in its low bits, and one of the
            second; otherwise two rows that are neighbours.
        is_torchs: whether torch's product reads it.
    """

    block: int
    is_split: bool
    is_torchs: bool = True

    def pack(self, codes_OI: torch.Tensor) -> torch.Tensor:
        """Puts codes in this order, some rows at a time: ``[O, I / 2]``.

        Args:
            codes_OI: two in each byte, the first of them in its high half: ``[O, I / 2]``.
        """
        rows, bytes_wide = codes_OI.shape
        packed = torch.empty_like(codes_OI)
        for start in range(0, rows, self.block):
            part = codes_OI[start : start + self.block]
            codes = torch.stack((part >> 4, part & 0xF), dim=-1).view(self.block, 2 * bytes_wide)
            if self.is_split:
                first, second = codes.chunk(2)
            else:
                first, second = codes[::2], codes[1::2]
            mixed = (first | (second << 4)).t()
            packed[start : start + self.block] = mixed.reshape(self.block, bytes_wide)
        return packed

    def unpack(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The codes of some blocks as numbers from 0 to 15, ``[O, I]``."""
        rows, bytes_wide = packed.shape
        blocks, half, width = rows // self.block, self.block // 2, 2 * bytes_wide
        turned = packed.view(blocks, width, half).transpose(1, 2).contiguous()
        numbers = torch.empty(blocks, 2, half, width, dtype=dtype, device=packed.device)
        numbers[:, 0] = turned & 0xF
        numbers[:, 1] = turned >> 4
        if not self.is_split:
            numbers = numbers.transpose(1, 2).contiguous()
        return numbers.view(rows, width)


OUR_ORDER = CodeOrder(ROW_STEP, is_split=True, is_torchs=False)

_KNOWN_ORDERS = (
    CodeOrder(64, is_split=True),  # AVX-512
    CodeOrder(32, is_split=True),  # AVX2
    CodeOrder(64, is_split=False),
    CodeOrder(32, is_split=False),  # anything else
    CodeOrder(16, is_split=False),
)


@functools.cache
def find_order() -> CodeOrder:
    """The order that torch's product reads on this machine's CPU, or else ours."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (2 * ROW_STEP, 64), generator=generator, dtype=torch.int32)
    codes = ((numbers[:, ::2] << 4) | numbers[:, 1::2]).to(torch.uint8)
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    except (AttributeError, RuntimeError):
        return OUR_ORDER
    if theirs.dtype != torch.uint8 or theirs.numel() != codes.numel():
        return OUR_ORDER
    for order in _KNOWN_ORDERS:
        if torch.equal(order.pack(codes).flatten(), theirs.flatten()):
            return order
    return OUR_ORDER
