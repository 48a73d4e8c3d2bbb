"""Rotary position embedding.

A pair of a head's dimensions is turned by an angle that grows with the position; the pairs are
``(i, i + H/2)``, as Hugging Face lays them out. Cosines and sines are kept in a table that grows as
positions are used, one table for all blocks of a span.

Shapes: S tokens, N heads, H head size, P positions.

Source: Su et al. 2021, arXiv:2104.09864; the scaling of Llama 3.1, its published reference code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from kernels.rotary_config import RotaryConfig

_FIRST_POSITIONS = 2048

Positions = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Cosines and signed sines of tokens, for each of a model's kinds of rotary positions."""


class Placed(Protocol):
    """Consecutive tokens of a sequence."""

    @property
    def length(self) -> int:
        """How many came before them."""

    @property
    def tokens(self) -> int:
        """How many they are."""


def rotary_frequencies(config: RotaryConfig, head_size: int) -> torch.Tensor:
    """Radians per position of each pair, ``[H/2]``, float32."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    frequencies = 1.0 / (config.theta**exponents)
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "llama3":
        return _stretch_llama3(frequencies, config)
    return frequencies


def _stretch_llama3(frequencies: torch.Tensor, config: RotaryConfig) -> torch.Tensor:
    """Long waves are stretched in full, short ones not at all, those between in part."""
    wavelengths = 2 * math.pi / frequencies
    longest = config.original_positions / config.low_frequency_factor
    shortest = config.original_positions / config.high_frequency_factor
    smooth = (config.original_positions / wavelengths - config.low_frequency_factor) / (
        config.high_frequency_factor - config.low_frequency_factor
    )
    between = (1 - smooth) * frequencies / config.factor + smooth * frequencies
    stretched = torch.where(wavelengths > longest, frequencies / config.factor, between)
    return torch.where(wavelengths < shortest, frequencies, stretched)


class RotaryTable:
    """Cosines and sines by position.

    Args:
        config: of the model.
        head_size: even.
        dtype: of the hidden states.
        device: likewise.
    """

    def __init__(
        self, config: RotaryConfig, head_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._frequencies = rotary_frequencies(config, head_size)
        self._dtype = dtype
        self._device = device
        self._cos_PH = torch.empty(0)
        self._sin_PH = torch.empty(0)
        self._grow(_FIRST_POSITIONS)

    def at(self, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines of consecutive positions, each ``[tokens, 1, H]``, views."""
        end = start + tokens
        self._reach(end)
        return self._cos_PH[start:end].unsqueeze(1), self._sin_PH[start:end].unsqueeze(1)

    def at_places(self, places: Sequence[Placed]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `at`, for tokens of several sequences, one sequence after the other."""
        if all(place.tokens == 1 for place in places):
            return self._at_each([place.length for place in places])
        parts = [self.at(place.length, place.tokens) for place in places]
        return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])

    def _at_each(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self._reach(max(positions) + 1)
        # Not waiting: it is so small that it is out of this memory when the call returns.
        at_S = torch.tensor(positions).to(self._device, non_blocking=True)
        cos_SH, sin_SH = self._cos_PH.index_select(0, at_S), self._sin_PH.index_select(0, at_S)
        return cos_SH.unsqueeze(1), sin_SH.unsqueeze(1)

    def _reach(self, end: int) -> None:
        if end > self._cos_PH.shape[0]:
            with torch.inference_mode(False):  # a backward pass may come to need them
                self._grow(max(end, 2 * self._cos_PH.shape[0]))

    def _grow(self, positions: int) -> None:
        is_double = self._dtype == torch.float64
        # Angles are computed in float32 whatever the dtype, as Hugging Face does.
        angles_PF = torch.outer(torch.arange(positions).float(), self._frequencies)
        angles_PF = angles_PF.double() if is_double else angles_PF
        cos_PF, sin_PF = angles_PF.cos(), angles_PF.sin()
        # The first half of a head takes minus the second, so its sines carry the sign.
        self._cos_PH = torch.cat((cos_PF, cos_PF), dim=-1).to(self._device, self._dtype)
        self._sin_PH = torch.cat((-sin_PF, sin_PF), dim=-1).to(self._device, self._dtype)


def rotate(x_SNH: torch.Tensor, cos_S1H: torch.Tensor, sin_S1H: torch.Tensor) -> torch.Tensor:
    """Turns every head of every token by its position's angles, ``[S, N, H]``.

    Differentiable with respect to what is turned; that may have further dimensions before S.
    """
    if torch.is_grad_enabled() and x_SNH.requires_grad:
        turned_SNH: torch.Tensor = _Rotation.apply(x_SNH, cos_S1H, sin_S1H)  # type: ignore[no-untyped-call]
        return turned_SNH
    return _rotate(x_SNH, cos_S1H, sin_S1H)


def _rotate(x_SNH: torch.Tensor, cos_S1H: torch.Tensor, sin_S1H: torch.Tensor) -> torch.Tensor:
    half = x_SNH.shape[-1] // 2
    swapped_SNH = torch.cat((x_SNH[..., half:], x_SNH[..., :half]), dim=-1)
    return torch.addcmul(x_SNH * cos_S1H, swapped_SNH, sin_S1H)


class _Rotation(torch.autograd.Function):
    """`_rotate` with the gradient that torch would find, in as little time: turned back."""

    @staticmethod
    def forward(
        ctx: Any, x_SNH: torch.Tensor, cos_S1H: torch.Tensor, sin_S1H: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos_S1H, sin_S1H)
        return _rotate(x_SNH, cos_S1H, sin_S1H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SNH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos_S1H, sin_S1H = ctx.saved_tensors
        return _rotate(gradient_SNH, cos_S1H, -sin_S1H), None, None
