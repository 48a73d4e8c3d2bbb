"""A transformer decoder block, assembled from parts.

`DecoderBlock` knows the order of the parts and the caches of the segments; norm, positions,
attention and MLP are their own modules. Which parts a model has follows from its `ModelConfig`.

Shapes: S packed rows of all segments (or tokens of each sequence of a batch), B batch, T tokens
with prefixes, P tokens of a prefix, D hidden size, N query heads, K key and value heads, H head
size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.adapter import BlockAdapter
from kernels.attention import attend_batch, attend_many, attend_one
from kernels.linear import Linear
from kernels.mlp import GatedMLP
from kernels.model_config import ModelConfig
from kernels.norm import RMSNorm
from kernels.rotary import rotate
from kernels.weight_names import WEIGHT_NAMES

LinearMaker = Callable[[Sequence[str]], Linear]
"""Makes one linear layer of those that have these names in the checkpoint, side by side."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one segment's rows are: in the packed rows, and in the arena.

    Attributes:
        row: of the segment's first token.
        tokens: how many rows it has.
        offset: of the sequence's extent in the arena.
        length: tokens cached before this step.
    """

    row: int
    tokens: int
    offset: int
    length: int


class DecoderBlock:
    """One block with its weights.

    Args:
        config: of the model.
        block: its number.
        tensors: its weights, by their names in the checkpoint.
        make_linear: makes its linear layers, in whichever weight format.
    """

    def __init__(
        self,
        config: ModelConfig,
        block: int,
        tensors: Mapping[str, torch.Tensor],
        make_linear: LinearMaker,
    ) -> None:
        names = WEIGHT_NAMES[config.family]

        def linear(*parts: str) -> Linear:
            return make_linear([part.format(block=block) for part in parts])

        def norm(part: str) -> RMSNorm:
            return RMSNorm(tensors[f"{part.format(block=block)}.weight"], config.norm_eps)

        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._head_size = config.head_size
        self._input_norm = norm(names.input_norm)
        self._qkv = linear(*names.qkv)
        self._output = linear(names.output)
        self._mlp_norm = norm(names.mlp_norm)
        self._mlp = GatedMLP(linear(*names.gate_up), linear(names.down))

    @property
    def weight_bytes(self) -> int:
        """The memory that the weights take."""
        norms = (self._input_norm.weight_D, self._mlp_norm.weight_D)
        linears = (self._qkv, self._output, *self._mlp.linears)
        return sum(norm.nbytes for norm in norms) + sum(part.weight_bytes for part in linears)

    def step(
        self,
        hidden_SD: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        places: Sequence[Place],
        cache_KTH: tuple[torch.Tensor, torch.Tensor],
        adapters: Sequence[BlockAdapter] = (),
    ) -> torch.Tensor:
        """New tokens of several sequences through the block, ``[S, D]``.

        Args:
            hidden_SD: their rows, packed.
            positions: cosines and sines of each row, ``[S, 1, H]``.
            places: of the segments.
            cache_KTH: the arena's keys and values for this block; written behind each ``length``.
            adapters: of all the sequences; their prefixes are in the cache already.
        """
        query_SNH, key_SKH, value_SKH = self._project(hidden_SD, positions, adapters)
        keys_KTH, values_KTH = cache_KTH
        outputs = []
        for place in places:
            rows = slice(place.row, place.row + place.tokens)
            begin = place.offset + place.length
            end = begin + place.tokens
            keys_KTH[:, begin:end] = key_SKH[rows].transpose(0, 1)
            values_KTH[:, begin:end] = value_SKH[rows].transpose(0, 1)
            attend = attend_one if place.tokens == 1 else attend_many
            outputs.append(
                attend(
                    query_SNH[rows],
                    keys_KTH[:, place.offset : end],
                    values_KTH[:, place.offset : end],
                )
            )
        attended_SD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self._finish(hidden_SD, attended_SD, adapters)

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        mask_BT: torch.Tensor | None = None,
        adapters: Sequence[BlockAdapter] = (),
    ) -> torch.Tensor:
        """Whole sequences through the block, without a cache, ``[B, S, D]``; differentiable.

        Args:
            hidden_BSD: their rows.
            positions: cosines and sines of one sequence's tokens, ``[S, 1, H]``.
            mask_BT: true for the tokens that others may attend to, prefixes included; none: all.
            adapters: of all the sequences.
        """
        batch, tokens, width = hidden_BSD.shape
        rows_SD = hidden_BSD.reshape(batch * tokens, width)
        query_BSNH, keys_BTKH, values_BTKH = self._project(
            rows_SD, positions, adapters, shape=(batch, tokens)
        )
        prefixes = [adapter.prefix for adapter in adapters if adapter.prefix is not None]
        if prefixes:
            keys, values = zip(*prefixes, strict=True)
            keys_BTKH = _stand_before(keys, keys_BTKH)
            values_BTKH = _stand_before(values, values_BTKH)
        attended_SD = attend_batch(query_BSNH, keys_BTKH, values_BTKH, mask_BT)
        return self._finish(rows_SD, attended_SD, adapters).reshape(batch, tokens, width)

    def _project(
        self,
        hidden_SD: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        adapters: Sequence[BlockAdapter],
        *,
        shape: tuple[int, ...] = (-1,),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, with the rows in some shape: ``[*shape, N or K, H]``."""
        turned = self._heads + self._kv_heads
        qkv = self._qkv.apply(self._input_norm.apply(hidden_SD), adapters).view(
            *shape, turned + self._kv_heads, self._head_size
        )
        to_turn, values = torch.split(qkv, [turned, self._kv_heads], dim=-2)
        queries, keys = torch.split(
            rotate(to_turn, *positions), [self._heads, self._kv_heads], dim=-2
        )
        return queries, keys, values

    def _finish(
        self,
        hidden_SD: torch.Tensor,
        attended_SD: torch.Tensor,
        adapters: Sequence[BlockAdapter],
    ) -> torch.Tensor:
        after_SD = self._output.add_to(hidden_SD, attended_SD, adapters)
        return self._mlp.add_to(after_SD, self._mlp_norm.apply(after_SD), adapters)


def _stand_before(prefixes: Sequence[torch.Tensor], rows_BSKH: torch.Tensor) -> torch.Tensor:
    batch = rows_BSKH.shape[0]
    expanded = [prefix_PKH.expand(batch, -1, -1, -1) for prefix_PKH in prefixes]
    return torch.cat([*expanded, rows_BSKH], dim=1)
