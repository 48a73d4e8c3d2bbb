"""What a model is made of, read from a Hugging Face ``config.json``.

Standard library only. A family is a row of `FAMILIES`: which parts its blocks have, and under which
names its checkpoints keep their tensors (`kernels.weight_names`). Everything else is in the file.
Invariant: the numbers of a `ModelConfig` are positive, within bounds, and divide as they must.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import CorruptCheckpoint, UnsupportedModel

MAX_BLOCKS = 4096
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 27


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scaling: ``none``, ``linear`` (positions divided by ``factor``), or ``llama3``
            (frequencies stretched by wavelength, as Llama 3.1 does).
        factor: of the stretch.
        low_frequency_factor: wavelengths over ``original_positions`` / this are stretched in full.
        high_frequency_factor: wavelengths under ``original_positions`` / this are left alone.
        original_positions: the context the model was first trained with.
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What all models of a family have in common.

    Attributes:
        qkv_bias: whether the projections have biases; none where the file says it.
        output_bias: of the attention's output projection, likewise.
        mlp_bias: of the MLP, likewise.
        has_sliding_window: whether the file's ``sliding_window`` holds without a further switch.
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    has_sliding_window: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, output_bias=False, mlp_bias=False, has_sliding_window=True),
    "qwen2": Family(qkv_bias=True, output_bias=False, mlp_bias=False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A model's shape.

    Attributes:
        family: a key of `FAMILIES`.
        num_kv_heads: fewer than ``num_heads`` for grouped-query attention.
        max_positions: the longest context.
        tie_embeddings: whether the head's matrix is the embedding's.
        eos_token_ids: tokens that end a text.
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
    norm_eps: float
    rotary: RotaryConfig
    max_positions: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values, of one token."""
        return self.num_kv_heads * self.head_size

    @property
    def query_size(self) -> int:
        """Width of the queries of one token."""
        return self.num_heads * self.head_size


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
            f"models of the type {name!r} are not supported; supported: {', '.join(FAMILIES)}"
        )
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"the activation {activation!r} is not supported in {name} models")
    hidden_size = _read_int(raw, "hidden_size", MAX_WIDTH)
    num_heads = _read_int(raw, "num_attention_heads", MAX_WIDTH)
    num_kv_heads = _read_int(raw, "num_key_value_heads", MAX_WIDTH, default=num_heads)
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise CorruptCheckpoint(f"{num_heads} heads do not divide a hidden size of {hidden_size}")
    head_size = _read_int(raw, "head_dim", MAX_WIDTH, default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CorruptCheckpoint(f"{num_kv_heads} key-value heads do not divide {num_heads} heads")
    if head_size % 2:
        raise CorruptCheckpoint(f"a head size of {head_size} is odd; rotary positions need pairs")
    max_positions = _read_int(raw, "max_position_embeddings", MAX_POSITIONS, default=2048)
    _check_sliding_window(raw, family, max_positions)
    attention_bias = _read_bool(raw, "attention_bias", default=False)
    return ModelConfig(
        family=name,
        vocab_size=_read_int(raw, "vocab_size", MAX_VOCABULARY),
        hidden_size=hidden_size,
        num_blocks=_read_int(raw, "num_hidden_layers", MAX_BLOCKS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        ffn_size=_read_int(raw, "intermediate_size", MAX_WIDTH),
        activation=activation,
        norm_eps=_read_float(raw, "rms_norm_eps", default=1e-6),
        rotary=_parse_rotary(raw, max_positions),
        max_positions=max_positions,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=(
            _read_bool(raw, "mlp_bias", default=False)
            if family.mlp_bias is None
            else family.mlp_bias
        ),
        tie_embeddings=_read_bool(raw, "tie_word_embeddings", default=False),
        eos_token_ids=_read_eos(raw),
    )


def _check_sliding_window(raw: Mapping[str, Any], family: Family, max_positions: int) -> None:
    window = raw.get("sliding_window")
    is_used = family.has_sliding_window or bool(raw.get("use_sliding_window"))
    if window is not None and is_used and isinstance(window, int) and window < max_positions:
        raise UnsupportedModel(
            f"a sliding window of {window} tokens is not supported yet; "
            "models whose window covers all positions are"
        )


def _parse_rotary(raw: Mapping[str, Any], max_positions: int) -> RotaryConfig:
    # transformers 5 writes everything under rope_parameters, earlier ones two separate keys.
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise CorruptCheckpoint("the rotary parameters in config.json are no JSON object")
    merged = {"rope_theta": raw.get("rope_theta", 10_000.0), **parameters}
    theta = _read_float(merged, "rope_theta", default=10_000.0)
    kind = merged.get("rope_type", merged.get("type", "default"))
    partial = merged.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModel("rotary positions on a part of each head are not supported yet")
    if kind == "default":
        return RotaryConfig(theta=theta)
    if kind not in ("linear", "llama3"):
        raise UnsupportedModel(
            f"rotary scaling of the kind {kind!r} is not supported; "
            "supported: default, linear, llama3"
        )
    factor = _read_float(merged, "factor", default=1.0)
    if kind == "linear":
        return RotaryConfig(theta=theta, scaling="linear", factor=factor)
    low = _read_float(merged, "low_freq_factor", default=1.0)
    high = _read_float(merged, "high_freq_factor", default=4.0)
    if high <= low:
        raise CorruptCheckpoint(f"rotary high_freq_factor {high} is not over low_freq_factor {low}")
    return RotaryConfig(
        theta=theta,
        scaling="llama3",
        factor=factor,
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_positions=_read_int(
            merged, "original_max_position_embeddings", MAX_POSITIONS, default=max_positions
        ),
    )


def _read_int(raw: Mapping[str, Any], key: str, most: int, *, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= most:
        raise CorruptCheckpoint(
            f"config.json says {key} = {value!r}; a whole number from 1 to {most} was expected"
        )
    return value


def _read_float(raw: Mapping[str, Any], key: str, *, default: float) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise CorruptCheckpoint(
            f"config.json says {key} = {value!r}; a positive number was expected"
        )
    return float(value)


def _read_bool(raw: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CorruptCheckpoint(f"config.json says {key} = {value!r}; true or false was expected")
    return value


def _read_eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CorruptCheckpoint(f"config.json says eos_token_id = {value!r}; token ids expected")
    return tuple(ids)
