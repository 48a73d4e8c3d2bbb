"""Normalisation of hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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

    def apply(self, x_SD: torch.Tensor) -> torch.Tensor:
        """The normalised rows, ``[S, D]``."""
        if x_SD.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x_SD, self._shape, self.weight_D, self._eps)
        # Llama rounds to the dtype before the gain, and so must we, to give the same.
        normed_SD = F.rms_norm(x_SD.float(), self._shape, None, self._eps)
        return normed_SD.to(x_SD.dtype) * self.weight_D
