"""A transformer decoder block, assembled from parts.

`DecoderBlock` knows the order of the parts and the caches of the segments; norm, projection with
positions, attention and MLP are their own modules. Which parts a model has follows from its
`ModelConfig`.

Shapes: S packed rows of all segments (or tokens of each sequence of a batch), B batch, T tokens
with prefixes, P tokens of a prefix, D hidden size, K key and value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.adapter import BlockAdapter
from kernels.attention import Attention, WindowAttention
from kernels.decode_kernel import find_decode_kernel
from kernels.experts import Experts
from kernels.linear import Linear
from kernels.mlp import MLP, FeedForward
from kernels.model_config import ModelConfig
from kernels.norm import Norm, make_norm
from kernels.projection import AnyProjection, Projection
from kernels.rotary import Positions
from kernels.scored_attention import ScoredAttention, Scoring, alibi_slopes
from kernels.weight_names import names_of

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

    Its wiring, `ModelConfig.wiring`, is one of:

    - ``sequential``: attention is added to the block's input, and what the MLP makes of that;
    - ``parallel``: attention and MLP both see the block's input, and both are added to it;
    - ``post_norms``: sequential, with a norm of what attention and MLP give before it is added;
    - ``norms_kept``: sequential, but each is added to its own normalised input.

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
        names = names_of(config)

        def linear(*parts: str, expert: int = 0) -> Linear:
            return make_linear([part.format(block=block, expert=expert) for part in parts])

        def norm(part: str) -> Norm | None:
            return make_norm(config, tensors, part.format(block=block)) if part else None

        def mlp(expert: int = 0) -> MLP:
            up = linear(*names.gate_up, expert=expert)
            down = linear(names.down, expert=expert)
            return MLP(up, down, config.activation, is_gated=config.is_gated)

        input_norm = norm(names.input_norm)
        assert input_norm is not None
        self._input_norm = input_norm
        self._projection = _make_projection(
            config, block, linear(*names.qkv), norm(names.query_norm), norm(names.key_norm)
        )
        gain_D = tensors[f"{names.input_norm.format(block=block)}.weight"]
        self._attention = _make_attention(config, block, gain_D)
        self._output = linear(names.output)
        self._output_norm = norm(names.output_norm)
        self._mlp_norm = norm(names.mlp_norm)
        self._mlp: FeedForward
        if config.num_experts:
            router_XD = tensors[f"{names.router.format(block=block)}.weight"]
            experts = [mlp(expert) for expert in range(config.num_experts)]
            self._mlp = Experts(router_XD, experts, config.experts_per_token)
        else:
            self._mlp = mlp()
        self._down_norm = norm(names.down_norm)
        # Not a bound method: a block in a cycle would keep its weights until they are collected.
        self._finish = {
            "sequential": DecoderBlock._finish_in_turn,
            "parallel": DecoderBlock._finish_in_parallel,
            "post_norms": DecoderBlock._finish_normed,
            "norms_kept": DecoderBlock._finish_with_norms,
        }[config.wiring]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its linear layers."""
        return self._projection.qkv, self._output, *self._mlp.linears

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its weights that are in no linear layer."""
        norms = (self._input_norm, self._output_norm, self._mlp_norm, self._down_norm)
        of_norms = (part for norm in norms if norm is not None for part in norm.tensors)
        return *of_norms, *self._projection.tensors, *self._mlp.tensors

    @property
    def is_fixed(self) -> bool:
        """Whether a step runs the same kernels whatever the numbers are."""
        return self._mlp.is_fixed and all(linear.is_fixed for linear in self.linears)

    @property
    def has_decode_kernel(self) -> bool:
        """Whether `step` takes the places of rows, and `attend_rows` may be called."""
        return self._attention.has_kernel

    @property
    def weight_bytes(self) -> int:
        """The memory that the weights take."""
        in_linears = sum(linear.weight_bytes for linear in self.linears)
        return in_linears + sum(tensor.nbytes for tensor in self.tensors)

    def step(
        self,
        hidden_SD: torch.Tensor,
        positions: Positions,
        places: Sequence[Place],
        cache_KTH: tuple[torch.Tensor, torch.Tensor],
        adapters: Sequence[BlockAdapter] = (),
        places_2S: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """New tokens of several sequences through the block, ``[S, D]``.

        Args:
            hidden_SD: their rows, packed.
            positions: of each row, ``[S, 1, H]``.
            places: of the segments.
            cache_KTH: the arena's keys and values for this block; written behind each ``length``.
            adapters: of all the sequences; their prefixes are in the cache already.
            places_2S: for a decode step, the places as `attend_rows` reads them; or none.
        """
        x_SD, *projected = self.begin(hidden_SD, positions, adapters)
        if places_2S is None or not self.has_decode_kernel:
            attended_SA = self.attend(projected, places, cache_KTH)
        else:
            attended_SA = self.attend_rows(projected, places_2S, cache_KTH)
        return self.finish(hidden_SD, x_SD, attended_SA, adapters)

    def begin(
        self,
        hidden_SD: torch.Tensor,
        positions: Positions,
        adapters: Sequence[BlockAdapter] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`step` up to the attention: normalised rows, ``[S, D]``, queries, keys and values."""
        x_SD = self._input_norm.apply(hidden_SD)
        return x_SD, *self._projection.apply(x_SD, positions, adapters)

    def attend(
        self,
        projected: Sequence[torch.Tensor],
        places: Sequence[Place],
        cache_KTH: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """The attention of `step`, ``[S, N*H]``; writes keys and values into the cache.

        Args:
            projected: queries, keys and values, ``[S, N or K, H]``.
            places: as for `step`.
            cache_KTH: likewise.
        """
        query_SNH, key_SKH, value_SKH = projected
        keys_KTH, values_KTH = cache_KTH
        outputs = []
        for place in places:
            rows = slice(place.row, place.row + place.tokens)
            begin = place.offset + place.length
            end = begin + place.tokens
            keys_KTH[:, begin:end] = key_SKH[rows].transpose(0, 1)
            values_KTH[:, begin:end] = value_SKH[rows].transpose(0, 1)
            attend = self._attention.one if place.tokens == 1 else self._attention.many
            outputs.append(
                attend(
                    query_SNH[rows],
                    keys_KTH[:, place.offset : end],
                    values_KTH[:, place.offset : end],
                )
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_rows(
        self,
        projected: Sequence[torch.Tensor],
        places_2S: torch.Tensor,
        cache_KTH: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """What `attend` does, for one new token of each sequence, all at once, ``[S, N*H]``.

        Nothing but the tensors' numbers differs from one step of so many rows to the next.

        Args:
            projected: as for `attend`.
            places_2S: each sequence's `Place.offset` and `Place.length`, int64, on the device.
            cache_KTH: as for `step`.
        """
        query_SNH, key_SKH, value_SKH = projected
        return self._attention.decode((query_SNH, key_SKH, value_SKH), cache_KTH, places_2S)

    def finish(
        self,
        hidden_SD: torch.Tensor,
        x_SD: torch.Tensor,
        attended_SA: torch.Tensor,
        adapters: Sequence[BlockAdapter] = (),
    ) -> torch.Tensor:
        """`step` from the attention on, ``[S, D]``.

        Args:
            hidden_SD: the block's input.
            x_SD: the same, normalised.
            attended_SA: what `attend` gave.
            adapters: as for `step`.
        """
        return self._finish(self, hidden_SD, x_SD, attended_SA, adapters)

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        positions: Positions,
        mask_BT: torch.Tensor | None = None,
        adapters: Sequence[BlockAdapter] = (),
    ) -> torch.Tensor:
        """Whole sequences through the block, without a cache, ``[B, S, D]``; differentiable.

        Args:
            hidden_BSD: their rows.
            positions: of one sequence's tokens, ``[S, 1, H]``.
            mask_BT: true for the tokens that others may attend to, prefixes included; none: all.
            adapters: of all the sequences.
        """
        batch, tokens, width = hidden_BSD.shape
        rows_SD = hidden_BSD.reshape(batch * tokens, width)
        x_SD = self._input_norm.apply(rows_SD)
        query_BSNH, keys_BTKH, values_BTKH = self._projection.apply(
            x_SD, positions, adapters, (batch, tokens)
        )
        prefixes = [adapter.prefix for adapter in adapters if adapter.prefix is not None]
        if prefixes:
            keys, values = zip(*prefixes, strict=True)
            keys_BTKH = _stand_before(keys, keys_BTKH)
            values_BTKH = _stand_before(values, values_BTKH)
        attended_SD = self._attention.batch(query_BSNH, keys_BTKH, values_BTKH, mask_BT)
        output_SD = self._finish(self, rows_SD, x_SD, attended_SD, adapters)
        return output_SD.reshape(batch, tokens, width)

    def _finish_in_turn(
        self,
        hidden_SD: torch.Tensor,
        x_SD: torch.Tensor,
        attended_SD: torch.Tensor,
        adapters: Sequence[BlockAdapter],
    ) -> torch.Tensor:
        after_SD = self._output.add_to(hidden_SD, attended_SD, adapters)
        return self._mlp.add_to(after_SD, _normed(self._mlp_norm, after_SD), adapters)

    def _finish_in_parallel(
        self,
        hidden_SD: torch.Tensor,
        x_SD: torch.Tensor,
        attended_SD: torch.Tensor,
        adapters: Sequence[BlockAdapter],
    ) -> torch.Tensor:
        after_SD = self._output.add_to(hidden_SD, attended_SD, adapters)
        x_SD = x_SD if self._mlp_norm is None else self._mlp_norm.apply(hidden_SD)
        return self._mlp.add_to(after_SD, x_SD, adapters)

    def _finish_normed(
        self,
        hidden_SD: torch.Tensor,
        x_SD: torch.Tensor,
        attended_SD: torch.Tensor,
        adapters: Sequence[BlockAdapter],
    ) -> torch.Tensor:
        attention_SD = self._output.apply(attended_SD, adapters)
        after_SD = hidden_SD + _normed(self._output_norm, attention_SD)
        made_SD = self._mlp.apply(_normed(self._mlp_norm, after_SD), adapters)
        return after_SD + _normed(self._down_norm, made_SD)

    def _finish_with_norms(
        self,
        hidden_SD: torch.Tensor,
        x_SD: torch.Tensor,
        attended_SD: torch.Tensor,
        adapters: Sequence[BlockAdapter],
    ) -> torch.Tensor:
        normed_SD = _normed(self._mlp_norm, self._output.add_to(x_SD, attended_SD, adapters))
        return self._mlp.add_to(normed_SD, normed_SD, adapters)


def _make_projection(
    config: ModelConfig, block: int, qkv: Linear, query_norm: Norm | None, key_norm: Norm | None
) -> Projection:
    kind = 1 if len(config.rotary) > 1 and config.window(block) else 0
    norms = None if query_norm is None or key_norm is None else (query_norm, key_norm)
    if norms is None and config.rotary and not config.is_fused:
        return Projection(config, qkv, kind)
    return AnyProjection(config, qkv, kind, norms)


def _make_attention(config: ModelConfig, block: int, like: torch.Tensor) -> Attention:
    """For steps on some tensor's device, and in its dtype."""
    window, device = config.window(block), like.device
    if not config.has_plain_scores:
        return ScoredAttention(
            Scoring(
                scale=config.query_scale or config.head_size**-0.5,
                cap=config.score_cap,
                slopes_N=None if config.rotary else alibi_slopes(config.num_heads).to(device),
                is_rounded=config.has_rounded_alibi,
                window=window,
            )
        )
    kernel = find_decode_kernel(
        device, like.dtype, config.num_heads, config.num_kv_heads, config.head_size
    )
    if window:
        return WindowAttention(window, config.query_scale, kernel)
    return Attention(config.query_scale, kernel)


def _normed(norm: Norm | None, x_SD: torch.Tensor) -> torch.Tensor:
    return x_SD if norm is None else norm.apply(x_SD)


def _stand_before(prefixes: Sequence[torch.Tensor], rows_BSKH: torch.Tensor) -> torch.Tensor:
    batch = rows_BSKH.shape[0]
    expanded = [prefix_PKH.expand(batch, -1, -1, -1) for prefix_PKH in prefixes]
    return torch.cat([*expanded, rows_BSKH], dim=1)
