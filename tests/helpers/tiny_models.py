"""Tiny random checkpoints of every supported family, made by Hugging Face's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
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

FAMILIES = (
    "llama",
    "llama-tied",
    "llama-llama3-rope",
    "llama-linear-rope",
    "llama-biases",
    "llama-multi-head",
    "llama-wide-heads",
    "mistral",
    "qwen2",
)


def make_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model of a kind in `FAMILIES`."""
    torch.manual_seed(seed)
    shape = SHAPE | changes
    if name == "mistral":
        model: PreTrainedModel = MistralForCausalLM(MistralConfig(**shape, sliding_window=None))
    elif name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**(shape | _llama_changes(name))))
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


def _llama_changes(name: str) -> dict[str, Any]:
    return {
        "llama": {},
        "llama-tied": {"tie_word_embeddings": True},
        "llama-llama3-rope": {"rope_parameters": LLAMA3_SCALING},
        "llama-linear-rope": {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
        },
        "llama-biases": {"attention_bias": True, "mlp_bias": True},
        "llama-multi-head": {"num_key_value_heads": 6},
        "llama-wide-heads": {"head_dim": 16},
    }[name]
