"""An adapter that this daemon lends to the servers of a job, each the part for its blocks.

Invariant: what a part's digest says is what its values are; the numbers are never written to.

Shapes: L blocks, E numbers of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.adapter_form import AdapterForm, adapter_digest
from p2p.wire.adapter_messages import AdapterShape
from p2p.wire.tensor import WireTensor
from petald.adapter_store import adapter_rows, write_shape


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """An adapter's part for some blocks, as it is lent."""

    digest: bytes
    form: AdapterShape
    values: WireTensor


class LentAdapter:
    """An adapter whose numbers an app gave.

    Args:
        form: what it consists of.
        start: first block, absolute.
        values_LE: one row for each block, on the CPU; not written to from now on.
    """

    def __init__(self, form: AdapterForm, start: int, values_LE: torch.Tensor) -> None:
        self.form = form
        self.start = start
        self.values_LE = values_LE
        self._parts: dict[tuple[int, int], AdapterPart] = {}

    @property
    def end(self) -> int:
        """The block after its last one."""
        return self.start + self.values_LE.shape[0]

    def part(self, start: int, end: int) -> AdapterPart:
        """What is lent to a server of the blocks ``[start, end)``; made once."""
        known = self._parts.get((start, end))
        if known is None:
            values = adapter_rows(self.values_LE[start - self.start : end - self.start])
            digest = adapter_digest(
                self.form, start=start, end=end, dtype=values.dtype, data=values.data
            )
            known = AdapterPart(digest, write_shape(self.form), values)
            self._parts[start, end] = known
        return known
