"""A feed-forward part of several MLPs, of which each token passes through a few.

Shapes: S rows, D hidden size, X experts, A experts of each token.

Source: Shazeer et al. 2017, arXiv:1701.06538; the order of rounding is Mixtral's in Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.adapter import BlockAdapter
from kernels.linear import Linear
from kernels.mlp import MLP


class Experts:
    """The experts of a block, and the router that chooses among them.

    Args:
        router_XD: one row for each expert.
        experts: their MLPs.
        experts_per_token: how many see a token; their shares add up to one.
    """

    is_fixed = False  # each token has its own experts

    def __init__(
        self, router_XD: torch.Tensor, experts: Sequence[MLP], experts_per_token: int
    ) -> None:
        self._router_XD = router_XD
        self._experts = tuple(experts)
        self._experts_per_token = experts_per_token

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its weights, but for the router's."""
        return tuple(linear for expert in self._experts for linear in expert.linears)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its weights that are in no linear layer."""
        return (self._router_XD,)

    def add_to(
        self, residual_SD: torch.Tensor, x_SD: torch.Tensor, adapters: Sequence[BlockAdapter] = ()
    ) -> torch.Tensor:
        """What it makes of ``x``, added to the residual, ``[S, D]``."""
        return residual_SD + self.apply(x_SD, adapters)

    def apply(self, x_SD: torch.Tensor, adapters: Sequence[BlockAdapter] = ()) -> torch.Tensor:
        """What it makes of ``x``, ``[S, D]``; differentiable, but for the choice."""
        share_SA, expert_SA = self._route(x_SD)
        output_SD = torch.zeros_like(x_SD)
        for number in sorted(set(expert_SA.flatten().tolist())):
            row, place = torch.where(expert_SA == number)
            made_SD = self._experts[number].apply(x_SD[row], adapters)
            made_SD = made_SD * share_SA[row, place, None]
            output_SD.index_add_(0, row, made_SD.to(x_SD.dtype))
        return output_SD

    def _route(self, x_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares and numbers of each row's experts."""
        scores_SX = torch.mm(x_SD, self._router_XD.t())
        wide = torch.promote_types(x_SD.dtype, torch.float32)
        share_SA, expert_SA = torch.topk(
            scores_SX.softmax(dim=-1, dtype=wide), self._experts_per_token, dim=-1
        )
        return share_SA / share_SA.sum(dim=-1, keepdim=True), expert_SA
