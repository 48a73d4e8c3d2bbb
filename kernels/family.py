"""What all models of a family have in common. Standard library only.

A family is a row of `FAMILIES`: which parts its blocks have, what its ``config.json`` calls things,
and what holds where the file is silent. Under which names its checkpoints keep their tensors is in
`kernels.weight_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kernels.config_values import read_bool, read_int
from kernels.errors import UnsupportedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A row.

    Attributes:
        qkv_bias: whether the projections have biases; none where the file says it.
        output_bias: of the attention's output projection, likewise.
        mlp_bias: of the MLP, likewise.
        norm: ``rms``, ``rms_shifted`` (the gain is one more than the checkpoint's), or ``layer``.
        has_query_norm: whether each head's query and key are normalised.
        is_gated: whether the MLP has a gate.
        has_experts: whether blocks have several MLPs, and a router.
        activation: its function where the file cannot choose it; else empty.
        windows: which blocks attend to a window only: ``none``; ``all``; ``switched``, those from
            ``max_window_layers`` on if ``use_sliding_window`` says so; or ``patterned``, all but
            every ``sliding_window_pattern``-th.
        positions: ``rotary`` or ``alibi``.
        has_rounded_alibi: whether ALiBi's biases are rounded and scaled as Falcon's are.
        has_mlp_norm: whether the MLP's input has a norm of its own.
        wiring: how the parts are joined, see `kernels.block.DecoderBlock`.
        is_fused: whether query, key and value projections are one matrix, head by head.
        has_embedding_scale: whether embeddings are multiplied with the root of their width.
        has_score_cap: whether attention's scores are capped, softly.
        has_logit_cap: whether the logits are.
        must_be_unset: values that ask for what is not implemented, unless they are null or false.
        keys: what the file calls a value, where it is not what Llama's calls it: the first of these
            that is there. Nothing is read of what is called by no name.
        defaults: of values that the file lacks.
        vary: makes of the row, and of a file's values by Llama's names, those of its variant.
        inner: the key of the object that has the values; empty where the file itself has them.
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    norm: str = "rms"
    has_query_norm: bool = False
    is_gated: bool = True
    has_experts: bool = False
    activation: str = ""
    windows: str = "none"
    positions: str = "rotary"
    has_rounded_alibi: bool = False
    has_mlp_norm: bool = True
    wiring: str = "sequential"
    is_fused: bool = False
    has_embedding_scale: bool = False
    has_score_cap: bool = False
    has_logit_cap: bool = False
    must_be_unset: tuple[str, ...] = ()
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    vary: Callable[[Family, dict[str, Any]], tuple[Family, dict[str, Any]]] | None = None
    inner: str = ""


_NO_BIAS: dict[str, Any] = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}

_GEMMA2 = Family(
    mlp_bias=False,
    norm="rms_shifted",
    windows="patterned",
    wiring="post_norms",
    has_embedding_scale=True,
    has_score_cap=True,
    has_logit_cap=True,
    must_be_unset=("use_bidirectional_attention",),
    keys={"hidden_act": ("hidden_activation",)},
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
)

_GEMMA3 = replace(
    _GEMMA2,
    has_query_norm=True,
    has_score_cap=False,
    # Hugging Face's Gemma 3 takes a cap of the scores from the file, and does not apply it.
    must_be_unset=("use_bidirectional_attention", "attn_logit_softcapping"),
    defaults=_GEMMA2.defaults
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
    },
)


def _vary_falcon(family: Family, values: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Falcon's variants: that of 7B, that of 40B with groups of heads, and those of RW.

    Raises:
        UnsupportedModel: it is none of them.
    """
    is_grouped = read_bool(values, "new_decoder_architecture", default=False)
    is_parallel = read_bool(values, "parallel_attn", default=True)
    norms = read_int(values, "num_ln_in_parallel_attn", 2, default=2 if is_grouped else 1)
    if is_grouped and not is_parallel:
        raise UnsupportedModel(
            "config.json says new_decoder_architecture = True with parallel_attn = False, "
            "which no Falcon has; take the model's own config.json"
        )
    if not is_grouped and is_parallel and norms == 2:
        raise UnsupportedModel(
            "config.json says num_ln_in_parallel_attn = 2 without new_decoder_architecture, "
            "which no Falcon has; take the model's own config.json"
        )
    if not is_grouped:
        is_shared = read_bool(values, "multi_query", default=True)
        values = values | {"num_key_value_heads": 1 if is_shared else None}
    has_alibi = read_bool(values, "alibi", default=False)
    variant = replace(
        family,
        wiring="parallel" if is_parallel else "sequential",
        has_mlp_norm=norms == 2 or not is_parallel,
        positions="alibi" if has_alibi else "rotary",
    )
    return variant, values


FAMILIES: dict[str, Family] = {
    "bloom": Family(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layer",
        is_gated=False,
        activation="gelu_tanh",
        positions="alibi",
        is_fused=True,
        keys={
            "hidden_size": ("n_embed", "hidden_size"),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "num_key_value_heads": (),
            "head_dim": (),
            "intermediate_size": (),
            "rms_norm_eps": ("layer_norm_epsilon",),
            "max_position_embeddings": ("seq_length",),
            "has_kept_norms": ("apply_residual_connection_post_layernorm",),
        },
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    ),
    "falcon": Family(
        norm="layer",
        is_gated=False,
        has_rounded_alibi=True,
        is_fused=True,
        keys={
            "hidden_size": ("n_embed", "hidden_size"),
            "num_hidden_layers": ("num_hidden_layers", "n_layer"),
            "num_attention_heads": ("num_attention_heads", "n_head"),
            "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
            "head_dim": (),
            "intermediate_size": ("ffn_hidden_size",),
            "hidden_act": ("activation",),
            "rms_norm_eps": ("layer_norm_epsilon",),
            "attention_bias": ("bias",),
            "mlp_bias": ("bias",),
        },
        defaults={"hidden_act": "gelu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        vary=_vary_falcon,
    ),
    "gemma2": _GEMMA2,
    "gemma3": replace(_GEMMA3, inner="text_config"),
    "gemma3_text": _GEMMA3,
    "llama": Family(),
    "mistral": Family(**_NO_BIAS, windows="all"),
    "mixtral": Family(
        **_NO_BIAS,
        windows="all",
        has_experts=True,
        defaults={"rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family(
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        windows="switched",
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        mlp_bias=False,
        has_query_norm=True,
        windows="switched",
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
}
