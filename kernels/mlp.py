"""The feed-forward part of a block.

Shapes: S rows, D hidden size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

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
        gated_SF = gate(self._gate_up.apply(x_SD, adapters))
        return self._down.add_to(residual_SD, gated_SF, adapters)


def gate(gate_up_S2F: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of both side by side, ``[S, F]``; differentiable."""
    if torch.is_grad_enabled() and gate_up_S2F.requires_grad:
        gated_SF: torch.Tensor = _Gate.apply(gate_up_S2F)  # type: ignore[no-untyped-call]
        return gated_SF
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    return F.silu(gate_SF).mul_(up_SF)


class _Gate(torch.autograd.Function):
    """`gate`, with its gradient written side by side; only its input is kept for it."""

    @staticmethod
    def forward(ctx: Any, gate_up_S2F: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up_S2F)
        return gate(gate_up_S2F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SF: torch.Tensor) -> torch.Tensor:
        (gate_up_S2F,) = ctx.saved_tensors
        gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
        of_both_S2F = torch.empty_like(gate_up_S2F)
        of_gate_SF, of_up_SF = of_both_S2F.chunk(2, dim=-1)
        scratch_SF = F.silu(gate_SF)
        torch.mul(gradient_SF, scratch_SF, out=of_up_SF)
        torch.mul(gradient_SF, up_SF, out=scratch_SF)
        torch.ops.aten.silu_backward.grad_input(scratch_SF, gate_SF, grad_input=of_gate_SF)
        return of_both_S2F
