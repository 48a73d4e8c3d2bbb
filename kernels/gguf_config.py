"""Read a GGUF file's metadata as a Hugging Face configuration, and name its tensors.

Pure: works on the metadata as a dictionary and on the shapes of the tensors. A key that would
change the arithmetic is either understood or refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.errors import CorruptCheckpoint, UnsupportedModel

LLAMA3_ROPE_TENSOR = "rope_freqs.weight"

# A family: its Hugging Face names, and whether ggml keeps its query and key rows interleaved.
_FAMILIES: dict[str, tuple[str, str, bool]] = {
    "llama": ("llama", "LlamaForCausalLM", True),  # also what Mistral and SmolLM are stored as
    "qwen2": ("qwen2", "Qwen2ForCausalLM", False),
}

_MAX_BLOCKS = 1024
_MAX_SIZE = 2**24

# ggml's name of a block's part, and Hugging Face's.
_BLOCK_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Llama 3.1 and later: GGUF holds only the resulting factors, so the known makings are tried.
# Source: "rope_scaling" in the config.json of Llama 3.1 (factor 8) and Llama 3.2 (factor 32).
_LLAMA3_SCALINGS = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """One tensor to write: its name there, its name in the GGUF file, and what to do to it."""

    name: str
    gguf_name: str
    rotary_heads: int = 0
    """Heads whose rows are interleaved for ggml's rotary positions; 0 where they are not."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide which tensors there must be, and of what shape."""

    blocks: int
    hidden_size: int
    feed_forward_size: int
    query_heads: int
    key_value_heads: int
    head_size: int
    vocab_size: int
    is_interleaved: bool
    tensor_names: frozenset[str]

    def embedding_plans(self) -> list[TensorPlan]:
        """What turns tokens into hidden states."""
        return [TensorPlan(name="model.embed_tokens.weight", gguf_name="token_embd.weight")]

    def head_plans(self) -> list[TensorPlan]:
        """What turns hidden states into logits; the output is absent where it is the embedding."""
        plans = [TensorPlan(name="model.norm.weight", gguf_name="output_norm.weight")]
        if "output.weight" in self.tensor_names:
            plans.append(TensorPlan(name="lm_head.weight", gguf_name="output.weight"))
        return plans

    def block_plans(self, block: int) -> list[TensorPlan]:
        """The tensors of one block: every weight, and the biases that the file has."""
        heads = {"attn_q": self.query_heads, "attn_k": self.key_value_heads}
        plans = []
        for part, name in _BLOCK_PARTS.items():
            for kind in ("weight", "bias"):
                gguf_name = f"blk.{block}.{part}.{kind}"
                if kind == "weight" or gguf_name in self.tensor_names:
                    plans.append(
                        TensorPlan(
                            name=f"model.layers.{block}.{name}.{kind}",
                            gguf_name=gguf_name,
                            rotary_heads=heads.get(part, 0) if self.is_interleaved else 0,
                        )
                    )
        return plans

    def expected_shape(self, gguf_name: str) -> tuple[int, ...]:
        """The shape that a tensor must have, outermost dimension first."""
        part, _, kind = gguf_name.rpartition(".")
        part = part.rpartition(".")[2]
        query_size = self.query_heads * self.head_size
        key_size = self.key_value_heads * self.head_size
        sizes: dict[str, tuple[int, ...]] = {
            "token_embd": (self.vocab_size, self.hidden_size),
            "output": (self.vocab_size, self.hidden_size),
            "attn_q": (query_size, self.hidden_size),
            "attn_k": (key_size, self.hidden_size),
            "attn_v": (key_size, self.hidden_size),
            "attn_output": (self.hidden_size, query_size),
            "ffn_gate": (self.feed_forward_size, self.hidden_size),
            "ffn_up": (self.feed_forward_size, self.hidden_size),
            "ffn_down": (self.hidden_size, self.feed_forward_size),
        }
        shape = sizes.get(part, (self.hidden_size,))
        return shape[:1] if kind == "bias" else shape


def config_from_metadata(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read_tensor: Callable[[str], npt.NDArray[Any]],
) -> tuple[ModelShape, dict[str, Any]]:
    """The model's shape, and its ``config.json`` but for the weights' type.

    Args:
        metadata: The file's keys and values.
        shapes: The shape of every tensor in the file, outermost dimension first.
        read_tensor: Gives a tensor's values; called for a small one at most.

    Raises:
        CorruptCheckpoint: Keys or tensors are missing, or contradict each other.
        UnsupportedModel: The model needs what this import does not know.
    """
    keys = _Keys(metadata)
    shape = _model_shape(keys, shapes)
    _check_tensors(shape, shapes)
    model_type, architecture, _ = _FAMILIES[keys.architecture]
    theta = keys.number("rope.freq_base", 10000.0)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.feed_forward_size,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(keys, shapes, read_tensor, theta, shape.head_size),
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    for name, key in _SPECIAL_TOKENS.items():
        token = metadata.get(key)
        if token is not None:
            if type(token) is not int or not 0 <= token < shape.vocab_size:
                raise CorruptCheckpoint(f"the GGUF file's {key} is {token!r}, outside its tokens")
            config[name] = token
    return shape, config


_SPECIAL_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


class _Keys:
    """The keys of the file's architecture, checked as they are read."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CorruptCheckpoint("the GGUF file does not name its architecture")
        if architecture not in _FAMILIES:
            raise UnsupportedModel(
                f"GGUF files of architecture {architecture[:40]!r} cannot be imported; "
                f"known are: {', '.join(sorted(_FAMILIES))}"
            )
        self.architecture = architecture
        self._metadata = metadata

    def get(self, key: str) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise CorruptCheckpoint(
                f"the GGUF file's {self.architecture}.{key} is {value!r:.60}; expected a whole "
                f"number from 1 to {_MAX_SIZE}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not float or not 0 < value < float("inf"):
            raise CorruptCheckpoint(
                f"the GGUF file's {self.architecture}.{key} is {value!r:.60}; expected a number"
            )
        # A float32 read as a double: 1e-5 has become 9.999999747378752e-06. Take the shortest
        # decimal that means the same float32, which is what the original config.json said.
        return float(str(np.float32(value)))


def _model_shape(keys: _Keys, shapes: Mapping[str, tuple[int, ...]]) -> ModelShape:
    for key in ("expert_count", "attention.sliding_window", "attention.clamp_kqv"):
        if keys.get(key):
            raise UnsupportedModel(
                f"the GGUF file sets {keys.architecture}.{key}, which the import does not know; "
                "pull the model's Hugging Face repository instead"
            )
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CorruptCheckpoint("the GGUF file has no token embedding")
    hidden_size, query_heads = keys.size("embedding_length"), keys.size("attention.head_count")
    key_value_heads = keys.size("attention.head_count_kv", query_heads)
    head_size = keys.size("attention.key_length", max(1, hidden_size // query_heads))
    blocks = keys.size("block_count")
    if blocks > _MAX_BLOCKS:
        raise CorruptCheckpoint(f"the GGUF file claims {blocks} blocks")
    if query_heads % key_value_heads or head_size % 2:
        raise CorruptCheckpoint(
            f"the GGUF file claims {query_heads} query heads, {key_value_heads} key heads of "
            f"size {head_size}, which do not fit each other"
        )
    if (
        keys.size("attention.value_length", head_size) != head_size
        or keys.size("rope.dimension_count", head_size) != head_size
    ):
        raise UnsupportedModel(
            "the GGUF file's heads have values of another size than keys, or rotary positions on a "
            "part of each head only; the import does not know such models"
        )
    return ModelShape(
        blocks=blocks,
        hidden_size=hidden_size,
        feed_forward_size=keys.size("feed_forward_length"),
        query_heads=query_heads,
        key_value_heads=key_value_heads,
        head_size=head_size,
        vocab_size=embedding[0],
        is_interleaved=_FAMILIES[keys.architecture][2],
        tensor_names=frozenset(shapes),
    )


def _check_tensors(shape: ModelShape, shapes: Mapping[str, tuple[int, ...]]) -> None:
    plans = shape.embedding_plans() + shape.head_plans()
    for block in range(shape.blocks):
        plans += shape.block_plans(block)
    for plan in plans:
        found, expected = shapes.get(plan.gguf_name), shape.expected_shape(plan.gguf_name)
        if found != expected:
            raise CorruptCheckpoint(
                f"the GGUF file's tensor {plan.gguf_name} "
                + ("is missing" if found is None else f"is {found}, expected {expected}")
            )
    unknown = set(shapes) - {plan.gguf_name for plan in plans} - {LLAMA3_ROPE_TENSOR}
    if unknown:
        raise UnsupportedModel(
            f"the GGUF file has {len(unknown)} tensors that the import does not know, among them "
            f"{min(unknown)[:60]!r}; pull the model's Hugging Face repository instead"
        )


def _rope_scaling(
    keys: _Keys,
    shapes: Mapping[str, tuple[int, ...]],
    read_tensor: Callable[[str], npt.NDArray[Any]],
    theta: float,
    head_size: int,
) -> dict[str, Any] | None:
    if LLAMA3_ROPE_TENSOR in shapes:
        found = read_tensor(LLAMA3_ROPE_TENSOR).astype(np.float64)
        for scaling in _LLAMA3_SCALINGS:
            expected = llama3_rope_factors(theta=theta, head_size=head_size, scaling=scaling)
            if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4):
                return scaling
        raise UnsupportedModel(
            f"the GGUF file's {LLAMA3_ROPE_TENSOR} is not the scaling of Llama 3.1 or 3.2; "
            "pull the model's Hugging Face repository instead"
        )
    kind = keys.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    raise UnsupportedModel(
        f"the GGUF file scales its rotary positions by {str(kind)[:40]!r}, which the import does "
        "not know; pull the model's Hugging Face repository instead"
    )


def llama3_rope_factors(
    *, theta: float, head_size: int, scaling: Mapping[str, Any]
) -> npt.NDArray[np.float64]:
    """What each rotary frequency is divided by, as the conversion to GGUF works it out.

    Source: Llama 3.1's published reference code, `apply_scaling`.
    """
    frequencies = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth))
