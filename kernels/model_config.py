"""What a model is made of, read from a Hugging Face ``config.json``.

Standard library only. A family is a row of `kernels.family.FAMILIES`: which parts its blocks have;
under which names its checkpoints keep their tensors is in `kernels.weight_names`. Everything else
is in the file.
Invariant: the numbers of a `ModelConfig` are positive, within bounds, and divide as they must.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.config_values import (
    MAX_BLOCKS,
    MAX_EXPERTS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    quote,
    read_bool,
    read_eos,
    read_float,
    read_int,
    read_optional_float,
)
from kernels.errors import CorruptCheckpoint, UnsupportedModel
from kernels.family import FAMILIES, Family
from kernels.rotary_config import RotaryConfig, parse_rotary

_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A model's shape.

    Attributes:
        family: a key of `kernels.family.FAMILIES`.
        num_kv_heads: fewer than ``num_heads`` for grouped-query attention.
        activation: of the MLP: ``silu``, ``gelu``, or ``gelu_tanh``, its approximation.
        rotary: none where positions are ALiBi's; two where blocks with a window have their own.
        max_positions: the longest context.
        tie_embeddings: whether the head's matrix is the embedding's.
        eos_token_ids: tokens that end a text.
        windows: how many tokens each block attends to, its own included, 0 for all; empty where
            that is so in every block.
        query_scale: what scores are multiplied with; none: one over the root of the head size.
        score_cap: what the scores' size stays below, softly.
        logit_cap: likewise the logits'.
        num_experts: of each block; 0 where it has one MLP.
        experts_per_token: how many of them see a token.

    The rest is as in `kernels.family.Family`.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    activation: str
    norm: str
    norm_eps: float
    rotary: tuple[RotaryConfig, ...]
    max_positions: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    query_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    wiring: str = "sequential"
    has_mlp_norm: bool = True
    has_rounded_alibi: bool = False
    has_query_norm: bool = False
    is_gated: bool = True
    is_fused: bool = False
    has_embedding_scale: bool = False

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values, of one token."""
        return self.num_kv_heads * self.head_size

    @property
    def query_size(self) -> int:
        """Width of the queries of one token."""
        return self.num_heads * self.head_size

    @property
    def embedding_scale(self) -> float | None:
        """What embeddings are multiplied with; or none."""
        return self.hidden_size**0.5 if self.has_embedding_scale else None

    @property
    def has_plain_scores(self) -> bool:
        """Whether attention's scores go into the softmax as they are."""
        return bool(self.rotary) and self.score_cap is None

    def window(self, block: int) -> int:
        """How many tokens a block attends to, its own included; 0 for all."""
        return self.windows[block] if self.windows else 0


def load_model_config(folder: Path) -> ModelConfig:
    """Reads a model folder's ``config.json``.

    Raises:
        CorruptCheckpoint: there is none, or it is no JSON object.
        UnsupportedModel: it describes what is not implemented.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{file} is missing; this is no model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file} cannot be read: {error}; fetch the model again") from error
    if not isinstance(raw, dict):
        raise CorruptCheckpoint(f"{file} holds no JSON object; fetch the model again")
    return parse_model_config(raw)


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Makes a model's configuration of the content of a ``config.json``.

    Raises:
        UnsupportedModel: the family, or a part of it, is not implemented.
        CorruptCheckpoint: a number is missing or cannot be.
    """
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(name, str):
        raise UnsupportedModel(
            f"models of the type {quote(name)} are not supported; supported: {', '.join(FAMILIES)}"
        )
    raw = _in_llamas_words(_without_shell(raw, family), family)
    if family.vary is not None:
        family, raw = family.vary(family, raw)
    for key in family.must_be_unset:
        if raw.get(key) not in (None, False):
            raise UnsupportedModel(
                f"config.json says {key} = {quote(raw[key])}, which is not supported in {name} "
                "models; those without it are"
            )
    num_blocks = read_int(raw, "num_hidden_layers", MAX_BLOCKS)
    max_positions = read_int(raw, "max_position_embeddings", MAX_POSITIONS, default=2048)
    hidden_size, num_heads, num_kv_heads, head_size = _read_heads(raw, family)
    num_experts, experts_per_token = _read_experts(raw) if family.has_experts else (0, 0)
    # Only where the family has them: any other file may say what it likes under these names.
    query_scalar = None
    if "query_pre_attn_scalar" in family.defaults:
        query_scalar = read_optional_float(raw, "query_pre_attn_scalar")
    has_kept_norms = "has_kept_norms" in family.keys and read_bool(
        raw, "has_kept_norms", default=False
    )
    attention_bias = read_bool(raw, "attention_bias", default=False)
    mlp_bias = read_bool(raw, "mlp_bias", default=False)
    return ModelConfig(
        family=name,
        vocab_size=read_int(raw, "vocab_size", MAX_VOCABULARY),
        hidden_size=hidden_size,
        num_blocks=num_blocks,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        ffn_size=read_int(
            raw,
            "intermediate_size",
            MAX_WIDTH,
            default=None if family.is_gated else 4 * hidden_size,
        ),
        activation=family.activation or _read_activation(raw, name),
        norm=family.norm,
        norm_eps=read_float(raw, "rms_norm_eps", default=1e-6),
        rotary=parse_rotary(raw, max_positions) if family.positions == "rotary" else (),
        max_positions=max_positions,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
        tie_embeddings=read_bool(raw, "tie_word_embeddings", default=False),
        eos_token_ids=read_eos(raw),
        windows=_read_windows(raw, family, num_blocks),
        query_scale=None if query_scalar is None else query_scalar**-0.5,
        score_cap=_read_cap(raw, "attn_logit_softcapping", is_read=family.has_score_cap),
        logit_cap=_read_cap(raw, "final_logit_softcapping", is_read=family.has_logit_cap),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        wiring="norms_kept" if has_kept_norms else family.wiring,
        has_mlp_norm=family.has_mlp_norm,
        has_rounded_alibi=family.has_rounded_alibi,
        has_query_norm=family.has_query_norm,
        is_gated=family.is_gated,
        is_fused=family.is_fused,
        has_embedding_scale=family.has_embedding_scale,
    )


def _without_shell(raw: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The values of the language model, where the file has them beside those of other parts."""
    if not family.inner:
        return raw
    inner = raw.get(family.inner)
    if not isinstance(inner, Mapping):
        raise CorruptCheckpoint(f"config.json has no object {family.inner}; fetch the model again")
    shared = ("eos_token_id", "tie_word_embeddings")
    return {**inner, **{key: raw[key] for key in shared if raw.get(key) is not None}}


def _in_llamas_words(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The file's values under the names that Llama's files have for them, with the defaults."""
    values = dict(family.defaults) | {k: v for k, v in raw.items() if k not in family.keys}
    for name, keys in family.keys.items():
        value = next((raw[key] for key in keys if raw.get(key) is not None), None)
        if value is not None:
            values[name] = value
    return values


def _read_heads(raw: Mapping[str, Any], family: Family) -> tuple[int, int, int, int]:
    """Hidden size, heads, key and value heads, and head size."""
    hidden_size = read_int(raw, "hidden_size", MAX_WIDTH)
    num_heads = read_int(raw, "num_attention_heads", MAX_WIDTH)
    num_kv_heads = read_int(raw, "num_key_value_heads", MAX_WIDTH, default=num_heads)
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise CorruptCheckpoint(f"{num_heads} heads do not divide a hidden size of {hidden_size}")
    head_size = read_int(raw, "head_dim", MAX_WIDTH, default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{num_kv_heads} key-value heads do not divide {num_heads} heads")
    if head_size % 2 and family.positions == "rotary":
        raise CorruptCheckpoint(f"a head size of {head_size} is odd; rotary positions need pairs")
    return hidden_size, num_heads, num_kv_heads, head_size


def _read_experts(raw: Mapping[str, Any]) -> tuple[int, int]:
    """How many experts each block has, and how many of them see a token."""
    count = read_int(raw, "num_local_experts", MAX_EXPERTS)
    return count, read_int(raw, "num_experts_per_tok", count)


def _read_cap(raw: Mapping[str, Any], key: str, *, is_read: bool) -> float | None:
    return read_optional_float(raw, key) if is_read else None


def _read_activation(raw: Mapping[str, Any], name: str) -> str:
    said = raw.get("hidden_act", "silu")
    activation = _ACTIVATIONS.get(said) if isinstance(said, str) else None
    if activation is None:
        raise UnsupportedModel(
            f"the activation {quote(said)} is not supported in {name} models; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )
    return activation


def _read_windows(raw: Mapping[str, Any], family: Family, num_blocks: int) -> tuple[int, ...]:
    """How many tokens each block attends to; see `ModelConfig.windows`."""
    if family.windows == "none" or raw.get("sliding_window") is None:
        window = 0
    else:
        window = read_int(raw, "sliding_window", MAX_POSITIONS)
    if family.windows == "switched" and not read_bool(raw, "use_sliding_window", default=False):
        window = 0
    kinds = raw.get("layer_types")
    if kinds is not None and family.windows != "none":
        return _windows_of_kinds(kinds, window, family, num_blocks)
    if not window:
        return ()
    if family.windows == "switched":
        first = raw.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise CorruptCheckpoint(
                f"config.json says max_window_layers = {quote(first)}; a whole number was expected"
            )
        windows = [window if block >= first else 0 for block in range(num_blocks)]
    elif family.windows == "patterned":
        pattern = read_int(raw, "sliding_window_pattern", MAX_BLOCKS)
        windows = [window if (block + 1) % pattern else 0 for block in range(num_blocks)]
    else:
        windows = [window] * num_blocks
    return tuple(windows) if any(windows) else ()


def _windows_of_kinds(
    kinds: object, window: int, family: Family, num_blocks: int
) -> tuple[int, ...]:
    """Windows where the file says of each block whether it has one."""
    if not isinstance(kinds, list) or len(kinds) != num_blocks:
        raise CorruptCheckpoint(
            f"config.json says layer_types = {quote(kinds)}; "
            f"the kind of each of {num_blocks} blocks was expected"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"blocks of the kind {quote(kind)} are not supported; "
                "supported: full_attention, sliding_attention"
            )
    has_window = [kind == "sliding_attention" for kind in kinds]
    if family.windows == "all" and any(has != bool(window) for has in has_window):
        raise UnsupportedModel(
            "config.json says that some blocks attend to a sliding window and others do not, which "
            "is not supported in models of this family"
        )
    if any(has_window) and not window:
        raise CorruptCheckpoint(
            "config.json says that blocks attend to a sliding window, and not how long it is"
        )
    return tuple(window if has else 0 for has in has_window) if any(has_window) else ()
