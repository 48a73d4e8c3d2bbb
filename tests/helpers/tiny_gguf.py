"""Write a tiny Llama or Qwen2 as a GGUF file, the way llama.cpp's conversion does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Sizes and choices; every tensor is random but repeatable."""

    architecture: str = "llama"
    blocks: int = 3
    hidden_size: int = 64
    feed_forward_size: int = 96
    query_heads: int = 4
    key_value_heads: int = 2
    vocab_size: int = 300
    is_tied: bool = True
    has_query_bias: bool = False
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
    pre_tokenizer: str = "smollm"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More keys; a value of None leaves the key out."""
    extra_tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.query_heads

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """The weights under Hugging Face's names, in its order of rows."""
        rng = np.random.default_rng(7)
        hidden, key_size = self.hidden_size, self.key_value_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.is_tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for block in range(self.blocks):
            prefix = f"model.layers.{block}."
            shapes |= {
                prefix + "input_layernorm.weight": (hidden,),
                prefix + "self_attn.q_proj.weight": (hidden, hidden),
                prefix + "self_attn.k_proj.weight": (key_size, hidden),
                prefix + "self_attn.v_proj.weight": (key_size, hidden),
                prefix + "self_attn.o_proj.weight": (hidden, hidden),
                prefix + "post_attention_layernorm.weight": (hidden,),
                prefix + "mlp.gate_proj.weight": (self.feed_forward_size, hidden),
                prefix + "mlp.up_proj.weight": (self.feed_forward_size, hidden),
                prefix + "mlp.down_proj.weight": (hidden, self.feed_forward_size),
            }
            if self.has_query_bias:
                shapes |= {
                    prefix + "self_attn.q_proj.bias": (hidden,),
                    prefix + "self_attn.k_proj.bias": (key_size,),
                    prefix + "self_attn.v_proj.bias": (key_size,),
                }
        return {
            name: (rng.standard_normal(shape) * 0.2).astype(np.float32)
            for name, shape in shapes.items()
        }


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(path: Path, model: TinyModel) -> Path:
    """Write `model` to `path`."""
    writer = gguf.GGUFWriter(path, model.architecture)
    for key, value in _metadata(model).items():
        _add(writer, key, value)
    tensors = {_gguf_name(name): (name, array) for name, array in model.tensors().items()}
    for gguf_name, (name, array) in tensors.items():
        heads = {"q_proj": model.query_heads, "k_proj": model.key_value_heads}
        part = name.split(".")[-2]
        if model.architecture == "llama" and part in heads:
            array = _permute(array, heads[part])
        if gguf_name not in model.left_out:
            _add_tensor(writer, gguf_name, array, model.quantisation)
    for gguf_name, extra in model.extra_tensors.items():
        writer.add_tensor(gguf_name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permute(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """What llama.cpp's conversion does to query and key rows."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, block, part = stem.split(".", 3)
        return f"blk.{block}.{_GGUF_NAMES[part]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    array: npt.NDArray[Any],
    quantisation: gguf.GGMLQuantizationType,
) -> None:
    if array.ndim == 1 or quantisation == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, array)
    else:
        packed = gguf.quants.quantize(array, quantisation)
        writer.add_tensor(name, packed, raw_dtype=quantisation)


def _metadata(model: TinyModel) -> dict[str, Any]:
    prefix = model.architecture
    tokens = byte_level_tokens()
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or"]
    tokens += ["".join(merge.split(" ")) for merge in merges] + ["<|im_start|>", "<|im_end|>"]
    metadata: dict[str, Any] = {
        f"{prefix}.block_count": model.blocks,
        f"{prefix}.context_length": 512,
        f"{prefix}.embedding_length": model.hidden_size,
        f"{prefix}.feed_forward_length": model.feed_forward_size,
        f"{prefix}.attention.head_count": model.query_heads,
        f"{prefix}.attention.head_count_kv": model.key_value_heads,
        f"{prefix}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{prefix}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": model.pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    merged = {**metadata, **model.extra}
    return {key: value for key, value in merged.items() if value is not None}


def byte_level_tokens() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
