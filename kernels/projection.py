"""Queries, keys and values of a block's tokens, with their positions in them.

Shapes: S rows (or any dimensions in their stead), D hidden size, N query heads, K key and value
heads, G = N/K, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.adapter import BlockAdapter
from kernels.linear import Linear
from kernels.model_config import ModelConfig
from kernels.norm import Norm
from kernels.rotary import Positions, rotate


class Projection:
    """Three projections side by side; queries and keys are turned by their positions.

    Args:
        config: of the model.
        qkv: the projections, ``[D, (N+2K)*H]``.
        kind: which of the model's kinds of rotary positions.
    """

    def __init__(self, config: ModelConfig, qkv: Linear, kind: int) -> None:
        self.qkv = qkv
        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._head_size = config.head_size
        self._kind = kind

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its weights that are in no linear layer."""
        return ()

    def apply(
        self,
        x_SD: torch.Tensor,
        positions: Positions,
        adapters: Sequence[BlockAdapter],
        shape: tuple[int, ...] = (-1,),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, with the rows in some shape: ``[*shape, N or K, H]``."""
        turned = self._heads + self._kv_heads
        qkv = self.qkv.apply(x_SD, adapters).view(*shape, turned + self._kv_heads, self._head_size)
        to_turn, values = torch.split(qkv, [turned, self._kv_heads], dim=-2)
        queries, keys = torch.split(
            rotate(to_turn, *positions[self._kind]), [self._heads, self._kv_heads], dim=-2
        )
        return queries, keys, values


class AnyProjection(Projection):
    """`Projection` with the parts that not all families have.

    Args:
        config: of the model.
        qkv: ``[D, (N+2K)*H]``: queries, keys, values; or, where the model's are fused, for each of
            K heads its G queries, its key and its value.
        kind: as of `Projection`.
        norms: of each head's query and key, before they are turned; or none.
    """

    def __init__(
        self, config: ModelConfig, qkv: Linear, kind: int, norms: tuple[Norm, Norm] | None
    ) -> None:
        super().__init__(config, qkv, kind)
        self._norms = norms
        self._is_fused = config.is_fused
        self._is_turned = bool(config.rotary)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its weights that are in no linear layer."""
        norms = () if self._norms is None else self._norms
        return tuple(part for norm in norms for part in norm.tensors)

    def apply(
        self,
        x_SD: torch.Tensor,
        positions: Positions,
        adapters: Sequence[BlockAdapter],
        shape: tuple[int, ...] = (-1,),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, with the rows in some shape: ``[*shape, N or K, H]``."""
        queries, keys, values = self._split(self.qkv.apply(x_SD, adapters), shape)
        if self._norms is not None:
            queries, keys = self._norms[0].apply(queries), self._norms[1].apply(keys)
        if self._is_turned:
            angles = positions[self._kind]
            queries, keys = rotate(queries, *angles), rotate(keys, *angles)
        return queries, keys, values

    def _split(
        self, qkv: torch.Tensor, shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self._is_fused:
            parts = [self._heads, self._kv_heads, self._kv_heads]
            heads = qkv.view(*shape, sum(parts), self._head_size)
            queries, keys, values = torch.split(heads, parts, dim=-2)
            return queries, keys, values
        shared = self._heads // self._kv_heads
        heads = qkv.view(*shape, self._kv_heads, shared + 2, self._head_size)
        queries = heads[..., :shared, :].reshape(*shape, self._heads, self._head_size)
        return queries, heads[..., shared, :], heads[..., shared + 1, :]
