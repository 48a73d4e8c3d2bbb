"""Under which names checkpoints keep their tensors, by family.

Standard library only. Each part of a block is listed with the tensors that make it, in the order in
which the block joins them, so that reading a checkpoint needs no knowledge of any family.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightNames:
    """A family's names; ``{block}`` stands for the block's number.

    Attributes:
        qkv: query, key and value projections.
        gate_up: the MLP's gate and up projections.
    """

    embedding: str
    final_norm: str
    head: str
    input_norm: str
    qkv: tuple[str, ...]
    output: str
    mlp_norm: str
    gate_up: tuple[str, ...]
    down: str


_LLAMA = WeightNames(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    input_norm="model.layers.{block}.input_layernorm",
    qkv=(
        "model.layers.{block}.self_attn.q_proj",
        "model.layers.{block}.self_attn.k_proj",
        "model.layers.{block}.self_attn.v_proj",
    ),
    output="model.layers.{block}.self_attn.o_proj",
    mlp_norm="model.layers.{block}.post_attention_layernorm",
    gate_up=("model.layers.{block}.mlp.gate_proj", "model.layers.{block}.mlp.up_proj"),
    down="model.layers.{block}.mlp.down_proj",
)

WEIGHT_NAMES: dict[str, WeightNames] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA}


def linear_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Width in and out of a block's linear layers, by the last part of their checkpoint names.

    These are the names that PEFT calls target modules.
    """
    names = WEIGHT_NAMES[config.family]
    hidden, ffn = config.hidden_size, config.ffn_size
    outs = (config.query_size, config.kv_size, config.kv_size)
    sizes = {name: (hidden, out) for name, out in zip(names.qkv, outs, strict=True)}
    sizes[names.output] = (config.query_size, hidden)
    sizes |= dict.fromkeys(names.gate_up, (hidden, ffn))
    sizes[names.down] = (ffn, hidden)
    return {short_name(name): size for name, size in sizes.items()}


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """A block's linear layers by their names in checkpoints, with ``{block}`` for its number.

    In the order of `linear_sizes`.
    """
    names = WEIGHT_NAMES[config.family]
    return (*names.qkv, names.output, *names.gate_up, names.down)


def short_name(name: str) -> str:
    """The last part of a name: ``q_proj``."""
    return name.rpartition(".")[2]


def block_shapes(config: ModelConfig, block: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a block, by its name in the checkpoint, with its shape there."""
    names = WEIGHT_NAMES[config.family]
    hidden, ffn = config.hidden_size, config.ffn_size
    sizes = (config.query_size, config.kv_size, config.kv_size)
    linears = [
        *(
            (name, size, hidden, config.qkv_bias)
            for name, size in zip(names.qkv, sizes, strict=True)
        ),
        (names.output, hidden, config.query_size, config.output_bias),
        *((name, ffn, hidden, config.mlp_bias) for name in names.gate_up),
        (names.down, hidden, ffn, config.mlp_bias),
    ]
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (hidden,) for name in (names.input_norm, names.mlp_norm)
    }
    for name, size_out, size_in, has_bias in linears:
        shapes[f"{name}.weight"] = (size_out, size_in)
        if has_bias:
            shapes[f"{name}.bias"] = (size_out,)
    return {name.format(block=block): shape for name, shape in shapes.items()}
