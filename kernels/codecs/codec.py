"""How hidden states are written as bytes, row by row: what every codec promises.

Every row is encoded by itself, and a row's bytes depend on nothing but the row: so encoded rows can
be cut and joined as bytes, and a history that was kept as it came decodes to the same bits,
however its rows are grouped later. Nothing here knows the wire.

Gradients of hidden states are rows like any other, some 1e-6 and smaller. What a codec leaves of
them, as the error's part of the gradient's length after one link and at the client after the 6
links of 5 hops (`benchmarks/codecs.py`, SmolLM2-135M): bfloat16 0.2 and 0.3 %, float16 0.1 and
0.5 %, int8 0.7 and 1.4 %, dynamic8 1.2 and 2.7 %, hadamard5 4 and 7 %, hadamard4 8 and 15 %. A
batch's own noise is far above one percent, so int8 is the one to begin with, and bfloat16 where its
bytes do not matter. In float16 the small ones are lost, the more the smaller the loss is scaled.

Shapes: S rows, D hidden size, R bytes of an encoded row.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Codec(Protocol):
    """One way to write rows."""

    @property
    def name(self) -> str:
        """Of it, on the wire."""

    @property
    def is_lossy(self) -> bool:
        """Whether what is decoded may not be what was encoded."""

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """How many bytes each row takes, R; arithmetic alone, so that sizes can be foretold."""

    def encode(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Rows as bytes, ``[S, R]`` uint8, contiguous, on the CPU; may share the input's memory.

        Args:
            hidden_SD: floats of any dtype, on any device, of any strides; S may be zero.

        Raises:
            NotFinite: a lossy codec met a number that is not finite, or that is beyond what it can
                write in the input's dtype. One that is not lossy writes whatever is in memory.
        """

    def decode(self, data_SR: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as rows, ``[S, D]`` in ``dtype``, on the bytes' device; may share their memory.

        Raises nothing whatever the bytes are: made-up ones give made-up numbers, not all finite.

        Args:
            data_SR: uint8, with as many bytes to a row as `row_bytes` says; not written to.
            hidden_size: D.
            dtype: of the values that were encoded.
        """
