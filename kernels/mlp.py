"""The feed-forward part of a block.

Shapes: S rows, D hidden size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels.adapter import BlockAdapter
from kernels.linear import Linear


class GatedMLP:
    """SwiGLU: ``down(silu(gate(x)) * up(x))``.

    Source: Shazeer 2020, arXiv:2002.05202.

    Args:
        gate_up: both projections in one, gate first, ``[D, 2F]``.
        down: ``[F, D]``.
    """

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its weights."""
        return self._gate_up, self._down

    def add_to(
        self, residual_SD: torch.Tensor, x_SD: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        """What it makes of ``x``, added to the residual, ``[S, D]``."""
        gate_SF, up_SF = self._gate_up.apply(x_SD, adapters).chunk(2, dim=-1)
        return self._down.add_to(residual_SD, F.silu(gate_SF) * up_SF, adapters)
