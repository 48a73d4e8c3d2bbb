"""Under which names checkpoints keep their tensors, by family.

Standard library only. Each part of a block is listed with the tensors that make it, in the order in
which the block joins them, so that reading a checkpoint needs no knowledge of any family.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from kernels.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightNames:
    """A family's names; ``{block}`` stands for the block's number, ``{expert}`` for the expert's.

    What a family has not is empty.

    Attributes:
        qkv: query, key and value projections, or the one matrix that has them all.
        query_norm: of each head's query.
        key_norm: likewise.
        output_norm: of what attention gives.
        gate_up: the MLP's, or each expert's, gate and up projections; or up alone.
        down_norm: of what the MLP gives.
        router: which chooses the experts.
        embedding_norm: of the embeddings.
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
    query_norm: str = ""
    key_norm: str = ""
    output_norm: str = ""
    down_norm: str = ""
    router: str = ""
    embedding_norm: str = ""


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

_BLOOM = WeightNames(
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    head="lm_head",
    input_norm="transformer.h.{block}.input_layernorm",
    qkv=("transformer.h.{block}.self_attention.query_key_value",),
    output="transformer.h.{block}.self_attention.dense",
    mlp_norm="transformer.h.{block}.post_attention_layernorm",
    gate_up=("transformer.h.{block}.mlp.dense_h_to_4h",),
    down="transformer.h.{block}.mlp.dense_4h_to_h",
    embedding_norm="transformer.word_embeddings_layernorm",
)

_FALCON = replace(_BLOOM, embedding_norm="")
_FALCON_PARALLEL = replace(_FALCON, mlp_norm="")
_FALCON_TWO_NORMS = replace(
    _FALCON, input_norm="transformer.h.{block}.ln_attn", mlp_norm="transformer.h.{block}.ln_mlp"
)

_GEMMA2 = replace(
    _LLAMA,
    output_norm="model.layers.{block}.post_attention_layernorm",
    mlp_norm="model.layers.{block}.pre_feedforward_layernorm",
    down_norm="model.layers.{block}.post_feedforward_layernorm",
)

_GEMMA3 = replace(
    _GEMMA2,
    query_norm="model.layers.{block}.self_attn.q_norm",
    key_norm="model.layers.{block}.self_attn.k_norm",
)

_MIXTRAL = replace(
    _LLAMA,
    router="model.layers.{block}.block_sparse_moe.gate",
    gate_up=(
        "model.layers.{block}.block_sparse_moe.experts.{expert}.w1",
        "model.layers.{block}.block_sparse_moe.experts.{expert}.w3",
    ),
    down="model.layers.{block}.block_sparse_moe.experts.{expert}.w2",
)

_QWEN3 = replace(
    _LLAMA,
    query_norm="model.layers.{block}.self_attn.q_norm",
    key_norm="model.layers.{block}.self_attn.k_norm",
)


def _within(names: WeightNames, outer: str, inner: str) -> WeightNames:
    """The same names with another beginning, where they have the first."""

    def moved(name: str) -> str:
        return inner + name[len(outer) :] if name.startswith(outer) else name

    values: dict[str, Any] = {}
    for field in fields(names):
        value = getattr(names, field.name)
        values[field.name] = moved(value) if isinstance(value, str) else tuple(map(moved, value))
    return WeightNames(**values)


_WEIGHT_NAMES: dict[str, WeightNames] = {
    "bloom": _BLOOM,
    "falcon": _FALCON,
    "gemma2": _GEMMA2,
    "gemma3": _within(_GEMMA3, "model.", "model.language_model."),
    "gemma3_text": _GEMMA3,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
}


OTHER_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "bloom": (("transformer.", ""),),
    "gemma3": (("model.language_model.", "language_model.model."),),
}
"""What some checkpoints of a family have in the place of a name's beginning.

The names above are those of Hugging Face's modules, for PEFT has them too. BLOOM's own checkpoints
were saved without the head, and Gemma 3's before its modules were named anew.
"""


def names_of(config: ModelConfig) -> WeightNames:
    """The names of a model's tensors."""
    if config.family == "falcon" and config.wiring == "parallel":
        return _FALCON_TWO_NORMS if config.has_mlp_norm else _FALCON_PARALLEL
    return _WEIGHT_NAMES[config.family]


def linear_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Width in and out of a block's linear layers, by the last part of their checkpoint names.

    These are the names that PEFT calls target modules. Experts' layers are not among them: PEFT
    does not know them as linear layers.
    """
    return {
        short_name(name): (size_in, size_out)
        for name, size_in, size_out, _ in _linears(config)
        if "{expert}" not in name
    }


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """A block's linear layers by their names in checkpoints, with ``{block}`` for its number.

    In the order of `linear_sizes`.
    """
    return tuple(name for name, *_ in _linears(config) if "{expert}" not in name)


def layer_weights(config: ModelConfig, block: int) -> tuple[str, ...]:
    """The matrices of a block's linear layers, experts' included, by their names in checkpoints."""
    return tuple(
        f"{name.format(block=block, expert=expert)}.weight"
        for name, *_ in _linears(config)
        for expert in range(max(1, config.num_experts) if "{expert}" in name else 1)
    )


def short_name(name: str) -> str:
    """The last part of a name: ``q_proj``."""
    return name.rpartition(".")[2]


def block_shapes(config: ModelConfig, block: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a block, by its name in the checkpoint, with its shape there."""
    names = names_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in (names.input_norm, names.mlp_norm, names.output_norm, names.down_norm):
        shapes |= norm_shapes(config, norm)
    for norm in (names.query_norm, names.key_norm):
        shapes |= norm_shapes(config, norm, config.head_size)
    if names.router:
        shapes[f"{names.router}.weight"] = (config.num_experts, config.hidden_size)
    for name, size_in, size_out, has_bias in _linears(config):
        for expert in range(max(1, config.num_experts) if "{expert}" in name else 1):
            label = name.replace("{expert}", str(expert))
            shapes[f"{label}.weight"] = (size_out, size_in)
            if has_bias:
                shapes[f"{label}.bias"] = (size_out,)
    return {name.format(block=block): shape for name, shape in shapes.items()}


def norm_shapes(config: ModelConfig, name: str, width: int = 0) -> dict[str, tuple[int, ...]]:
    """The tensors of a norm; nothing where it has no name.

    Args:
        config: of the model.
        name: in the checkpoint.
        width: of what it normalises; the hidden size by default.
    """
    parts = () if not name else ("weight", "bias") if config.norm == "layer" else ("weight",)
    return {f"{name}.{part}": (width or config.hidden_size,) for part in parts}


def _linears(config: ModelConfig) -> list[tuple[str, int, int, bool]]:
    """A block's linear layers: names, widths in and out, and whether they have biases."""
    names = names_of(config)
    hidden, ffn = config.hidden_size, config.ffn_size
    outs = [config.query_size, config.kv_size, config.kv_size]
    if config.is_fused:
        outs = [sum(outs)]
    return [
        *((name, hidden, out, config.qkv_bias) for name, out in zip(names.qkv, outs, strict=True)),
        (names.output, config.query_size, hidden, config.output_bias),
        *((name, hidden, ffn, config.mlp_bias) for name in names.gate_up),
        (names.down, ffn, hidden, config.mlp_bias),
    ]
