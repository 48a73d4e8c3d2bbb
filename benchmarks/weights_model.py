"""A few blocks of a large model's shape, with random weights: what a memory's speed governs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kernels.model_config import parse_model_config
from kernels.weight_names import block_shapes

# Of Llama 3 8B: Dubey et al. 2024, arXiv:2407.21783, table 3.
LARGE_SHAPE = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}


def write_large_blocks(folder: Path, blocks: int) -> Path:
    """A model folder, in bfloat16 and a file for each block, without embedding and head."""
    raw = LARGE_SHAPE | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(raw))
    config = parse_model_config(raw)
    generator = torch.Generator().manual_seed(0)
    file_of: dict[str, str] = {}
    for block in range(blocks):
        tensors = {}
        for name, shape in block_shapes(config, block).items():
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 1:
                tensor.fill_(1)
            else:
                tensor.normal_(0, 0.02, generator=generator)
            tensors[name] = tensor
        file = f"model-{block}.safetensors"
        save_file(tensors, folder / file)
        file_of |= dict.fromkeys(tensors, file)
    index = {"weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
