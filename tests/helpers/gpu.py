"""What tests of a GPU share; they are skipped where there is none."""

from __future__ import annotations

import pytest
import torch

GPU = torch.device("cuda")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def error_of(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """How far one is from the other, as a part of its length."""
    exact = exact.to("cpu", torch.float64)
    assert ours.shape == exact.shape
    return float((ours.to("cpu", torch.float64) - exact).norm() / exact.norm())
