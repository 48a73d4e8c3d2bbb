"""Normalisation of hidden states, or of each head's query and key.

Shapes: S rows, D their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.model_config import ModelConfig


class Norm(Protocol):
    """A normalisation with its weights."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its weights."""

    def apply(self, x_SD: torch.Tensor) -> torch.Tensor:
        """The normalised rows, ``[S, D]``; differentiable with respect to the input."""


def make_norm(config: ModelConfig, tensors: Mapping[str, torch.Tensor], name: str) -> Norm:
    """A norm of a model's kind.

    Args:
        config: of the model.
        tensors: its weights, and others, by their names in the checkpoint.
        name: of the norm there.
    """
    weight_D = tensors[f"{name}.weight"]
    if config.norm == "layer":
        return LayerNorm(weight_D, tensors[f"{name}.bias"], config.norm_eps)
    if config.norm == "rms_shifted":
        return ShiftedRMSNorm(weight_D, config.norm_eps)
    return RMSNorm(weight_D, config.norm_eps)


class RMSNorm:
    """Root mean square normalisation, computed in float32 whatever the dtype.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        weight_D: the gain.
        eps: added to the mean square.
    """

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        self.weight_D = weight_D
        self._eps = eps
        self._shape = (weight_D.shape[0],)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its weights."""
        return (self.weight_D,)

    def apply(self, x_SD: torch.Tensor) -> torch.Tensor:
        """The normalised rows, ``[S, D]``; differentiable."""
        is_constant = not self.weight_D.requires_grad
        if torch.is_grad_enabled() and x_SD.requires_grad and is_constant:
            normed_SD: torch.Tensor = _Normalisation.apply(x_SD, self)  # type: ignore[no-untyped-call]
            return normed_SD
        return self.normalise(x_SD)

    def normalise(self, x_SD: torch.Tensor) -> torch.Tensor:
        """`apply` without a gradient."""
        if x_SD.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x_SD, self._shape, self.weight_D, self._eps)
        # Llama rounds to the dtype before the gain, and so must we, to give the same.
        normed_SD = F.rms_norm(x_SD.float(), self._shape, None, self._eps)
        return normed_SD.to(x_SD.dtype) * self.weight_D

    def backward(self, x_SD: torch.Tensor, gradient_SD: torch.Tensor) -> torch.Tensor:
        """The gradient of the input, ``[S, D]``, from that of the output.

        With ``r`` one over the root of the mean square and ``n = x * r``, that of ``n`` is turned
        into ``r * (g - n * mean(g * n))``.
        """
        wide = torch.float64 if x_SD.dtype == torch.float64 else torch.float32
        of_normed_SD = (gradient_SD * self.weight_D).to(wide)
        x_SD = x_SD.to(wide)
        scale_S1 = (x_SD.square().mean(dim=-1, keepdim=True) + self._eps).rsqrt_()
        normed_SD = x_SD * scale_S1
        along_S1 = (of_normed_SD * normed_SD).mean(dim=-1, keepdim=True)
        of_normed_SD.addcmul_(normed_SD, along_S1, value=-1).mul_(scale_S1)
        return of_normed_SD.to(gradient_SD.dtype)


class ShiftedRMSNorm(RMSNorm):
    """An `RMSNorm` as Gemma has it: the gain is one more than the checkpoint's weight.

    Args:
        weight_D: the gain less one.
        eps: added to the mean square.
    """

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        # In float32, for Gemma rounds to the dtype only after the gain.
        wide = torch.promote_types(weight_D.dtype, torch.float32)
        super().__init__(1 + weight_D.to(wide), eps)

    def normalise(self, x_SD: torch.Tensor) -> torch.Tensor:
        """`apply` without a gradient."""
        normed_SD = F.rms_norm(x_SD.to(self.weight_D.dtype), self._shape, self.weight_D, self._eps)
        return normed_SD.to(x_SD.dtype)


class LayerNorm:
    """Mean and variance normalised.

    Source: Ba et al. 2016, arXiv:1607.06450.

    Args:
        weight_D: the gain.
        bias_D: what is added.
        eps: added to the variance.
    """

    def __init__(self, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float) -> None:
        self._weight_D = weight_D
        self._bias_D = bias_D
        self._eps = eps
        self._shape = (weight_D.shape[0],)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its weights."""
        return self._weight_D, self._bias_D

    def apply(self, x_SD: torch.Tensor) -> torch.Tensor:
        """The normalised rows, ``[S, D]``; differentiable with respect to the input."""
        return F.layer_norm(x_SD, self._shape, self._weight_D, self._bias_D, self._eps)


class _Normalisation(torch.autograd.Function):
    """`RMSNorm.apply`, of which only the input is kept."""

    @staticmethod
    def forward(ctx: Any, x_SD: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        ctx.save_for_backward(x_SD)
        ctx.norm = norm
        return norm.normalise(x_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SD: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x_SD,) = ctx.saved_tensors
        norm: RMSNorm = ctx.norm
        return norm.backward(x_SD, gradient_SD), None
