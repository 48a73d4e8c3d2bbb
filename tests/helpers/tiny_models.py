"""Tiny random checkpoints of every supported family, made by Hugging Face's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

UNKNOWN = object()
"""In the place of a value that a family's configuration does not have."""

FAMILIES = (
    "bloom",
    "bloom-kept-norms",
    "falcon",
    "falcon-groups",
    "falcon-groups-one-norm",
    "falcon-sequential",
    "falcon-alibi",
    "gemma2",
    "gemma3",
    "llama",
    "llama-tied",
    "llama-llama3-rope",
    "llama-linear-rope",
    "llama-biases",
    "llama-multi-head",
    "llama-wide-heads",
    "mistral",
    "mistral-window",
    "mixtral",
    "mixtral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "qwen3-window",
)
"""Windows are shorter than the tests' sequences, those of the passes included."""


def make_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of a kind in `FAMILIES`."""
    torch.manual_seed(seed)
    make, config, settings = _KINDS[name]
    values = SHAPE | settings | changes
    values = {key: value for key, value in values.items() if value is not UNKNOWN}
    model: PreTrainedModel = make(config(**values))
    with torch.no_grad():  # gains and biases that do something
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model.eval()


def save_model(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "1GB") -> Path:
    """Writes a model folder; a small shard size makes shards and an index."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def layers_of(model: Any) -> Any:
    """The decoder layers of a model."""
    inner = model.base_model
    return inner.h if hasattr(inner, "h") else inner.layers


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What a model's ends make of its last layer's output."""
    inner = model.base_model
    norm = inner.ln_f if hasattr(inner, "ln_f") else inner.norm
    logits: torch.Tensor = model.lm_head(norm(hidden))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def without_embedding_norm(model: Any) -> Any:
    """A model that takes, as ``inputs_embeds``, what goes into its first layer."""
    if hasattr(model.base_model, "word_embeddings_layernorm"):
        model.base_model.word_embeddings_layernorm = torch.nn.Identity()
    return model


_GEMMA: dict[str, Any] = {
    "head_dim": 10,
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
    "tie_word_embeddings": True,
}


def _llama(**settings: Any) -> tuple[Any, Any, dict[str, Any]]:
    return LlamaForCausalLM, LlamaConfig, settings


def _falcon(**settings: Any) -> tuple[Any, Any, dict[str, Any]]:
    settings = {"num_key_value_heads": UNKNOWN, "tie_word_embeddings": True} | settings
    return FalconForCausalLM, FalconConfig, settings


_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bloom": (
        BloomForCausalLM,
        BloomConfig,
        {"tie_word_embeddings": True, "num_key_value_heads": UNKNOWN},
    ),
    "bloom-kept-norms": (
        BloomForCausalLM,
        BloomConfig,
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 4,
            "num_key_value_heads": UNKNOWN,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "falcon": _falcon(),
    "falcon-groups": _falcon(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=80),
    "falcon-groups-one-norm": _falcon(
        new_decoder_architecture=True,
        num_kv_heads=3,
        num_ln_in_parallel_attn=1,
        tie_word_embeddings=False,
    ),
    "falcon-sequential": _falcon(parallel_attn=False, bias=True),
    "falcon-alibi": _falcon(alibi=True, bias=True, multi_query=False, parallel_attn=False),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        _GEMMA
        | {
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True),
    "llama-llama3-rope": _llama(rope_parameters=LLAMA3_SCALING),
    "llama-linear-rope": _llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama-biases": _llama(attention_bias=True, mlp_bias=True),
    "llama-multi-head": _llama(num_key_value_heads=6),
    "llama-wide-heads": _llama(head_dim=16),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 5}),
    "mixtral-window": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3-window": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
