"""The feed-forward part of a block: an MLP, with a gate or without. `kernels.experts` has several.

Shapes: S rows, D hidden size, F feed-forward size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.adapter import BlockAdapter
from kernels.linear import Linear

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class FeedForward(Protocol):
    """What follows a block's attention."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its weights, but for a router's."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its weights that are in no linear layer."""

    @property
    def is_fixed(self) -> bool:
        """Whether it runs the same kernels whatever the numbers are."""

    def add_to(
        self, residual_SD: torch.Tensor, x_SD: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        """What it makes of ``x``, added to the residual, ``[S, D]``; a new tensor."""

    def apply(self, x_SD: torch.Tensor, adapters: Sequence[BlockAdapter] = ()) -> torch.Tensor:
        """What it makes of ``x``, ``[S, D]``."""


class MLP:
    """``down(activation(up(x)))``, or with a gate ``down(activation(gate(x)) * up(x))``.

    Source: of the gate, Shazeer 2020, arXiv:2002.05202.

    Args:
        up: ``[D, F]``; with a gate both projections in one, gate first, ``[D, 2F]``.
        down: ``[F, D]``.
        activation: a key of `ACTIVATIONS`.
        is_gated: whether there is a gate.
    """

    tensors: tuple[torch.Tensor, ...] = ()
    is_fixed = True

    def __init__(self, up: Linear, down: Linear, activation: str, *, is_gated: bool) -> None:
        self._up = up
        self._down = down
        self._inner = choose_inner(activation, is_gated=is_gated)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its weights."""
        return self._up, self._down

    def add_to(
        self, residual_SD: torch.Tensor, x_SD: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        """What it makes of ``x``, added to the residual, ``[S, D]``."""
        inner_SF = self._inner(self._up.apply(x_SD, adapters))
        return self._down.add_to(residual_SD, inner_SF, adapters)

    def apply(self, x_SD: torch.Tensor, adapters: Sequence[BlockAdapter] = ()) -> torch.Tensor:
        """What it makes of ``x``, ``[S, D]``."""
        return self._down.apply(self._inner(self._up.apply(x_SD, adapters)), adapters)


def choose_inner(activation: str, *, is_gated: bool) -> Activation:
    """What stands between an MLP's projections."""
    if not is_gated:
        return ACTIVATIONS[activation]
    if activation == "silu":
        return gate
    return functools.partial(_gate_plainly, ACTIVATIONS[activation])


def _gate_plainly(activation: Activation, gate_up_S2F: torch.Tensor) -> torch.Tensor:
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    return activation(gate_SF) * up_SF


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
