"""What a ``config.json`` may say, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from kernels.errors import CorruptCheckpoint, KernelError, UnsupportedModel
from kernels.family import FAMILIES
from kernels.model_config import parse_model_config
from kernels.rotary_config import RotaryConfig
from kernels.weight_names import block_shapes

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 1.5, "x", "", [], [1], {}, {"x": 1}),
    *(10**30, 10**400, float("nan"), float("inf"), -0.5, [None] * 4, ["full_attention"] * 4),
)
KEYS = sorted(
    {
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim"),
        *("hidden_act", "rms_norm_eps", "attention_bias", "eos_token_id", "tie_word_embeddings"),
        *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "layer_types"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern"),
        *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        *("num_local_experts", "num_experts_per_tok", "text_config", "alibi", "multi_query"),
        *("parallel_attn", "new_decoder_architecture", "num_ln_in_parallel_attn", "num_kv_heads"),
        *(key for family in FAMILIES.values() for keys in family.keys.values() for key in keys),
    }
)

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def of(family: str, **values: Any) -> dict[str, Any]:
    return SHAPE | {"model_type": family} | values


WINDOWS: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    (of("llama", sliding_window=9), ()),
    (of("mistral"), ()),
    (of("mistral", sliding_window=None), ()),
    (of("mistral", sliding_window=9), (9, 9, 9, 9)),
    (of("mistral", sliding_window=9, layer_types=["sliding_attention"] * 4), (9, 9, 9, 9)),
    (of("qwen2", sliding_window=9), ()),
    (of("qwen2", sliding_window=9, use_sliding_window=False, max_window_layers=0), ()),
    (of("qwen2", sliding_window=9, use_sliding_window=True), ()),
    (of("qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=1), (0, 9, 9, 9)),
    (of("qwen3", use_sliding_window=True, max_window_layers=3), (0, 0, 0, 4096)),
    (
        of(
            "qwen3",
            sliding_window=9,
            use_sliding_window=True,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
        (0, 9, 0, 9),
    ),
    (of("qwen3", layer_types=["full_attention"] * 4), ()),
    (of("gemma2"), (4096, 0, 4096, 0)),
    (of("gemma2", sliding_window=None), ()),
    (of("gemma3_text", sliding_window=9), (9, 9, 9, 9)),
    (of("gemma3_text", sliding_window=9, sliding_window_pattern=2), (9, 0, 9, 0)),
    (of("gemma3_text", sliding_window_pattern=1), ()),
)


@pytest.mark.parametrize(("raw", "windows"), WINDOWS, ids=str)
def test_which_blocks_have_a_window(raw: dict[str, Any], windows: tuple[int, ...]) -> None:
    config = parse_model_config(raw)
    assert config.windows == windows
    assert [config.window(block) for block in range(4)] == list(windows or (0,) * 4)


def test_what_gemma3s_own_file_leaves_out() -> None:
    # As of google/gemma-3-4b-it, less what belongs to images.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = parse_model_config(
        {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text}
    )
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (8, 4, 256)
    assert config.rotary == (
        RotaryConfig(theta=1e6, scaling="linear", factor=8.0),
        RotaryConfig(theta=1e4),
    )
    assert config.windows == ((1024,) * 5 + (0,)) * 5 + (1024,) * 4
    assert (config.query_scale, config.score_cap, config.logit_cap) == (1 / 16, None, None)
    assert (config.vocab_size, config.eos_token_ids) == (262_208, (1, 106))
    assert config.tie_embeddings
    assert config.activation == "gelu_tanh"


def test_a_cap_may_be_absent_or_null() -> None:
    config = parse_model_config(of("gemma2"))
    assert (config.score_cap, config.logit_cap) == (50.0, 30.0)
    config = parse_model_config(of("gemma2", attn_logit_softcapping=None, hidden_act="gelu"))
    assert (config.score_cap, config.logit_cap) == (None, 30.0)
    assert config.activation == "gelu_tanh"


def test_what_blooms_files_call_things() -> None:
    raw = {
        "model_type": "bloom",
        "vocab_size": 101,
        "n_embed": 48,
        "n_layer": 3,
        "num_attention_heads": 4,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-4,
        "intermediate_size": 7,
    }
    config = parse_model_config(raw)
    assert (config.num_blocks, config.hidden_size, config.ffn_size) == (3, 48, 192)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (4, 4, 12)
    assert (config.max_positions, config.norm_eps, config.rotary) == (2048, 1e-4, ())
    assert config.tie_embeddings
    assert config.wiring == "sequential"
    kept = parse_model_config(raw | {"apply_residual_connection_post_layernorm": True})
    assert kept.wiring == "norms_kept"


def test_falcons_variants() -> None:
    config = parse_model_config(of("falcon", num_kv_heads=6, head_dim=3, intermediate_size=7))
    assert (config.num_kv_heads, config.head_size, config.ffn_size) == (1, 8, 192)
    assert (config.wiring, config.has_mlp_norm, config.activation) == ("parallel", False, "gelu")
    config = parse_model_config(of("falcon", new_decoder_architecture=True, num_kv_heads=2))
    assert (config.num_kv_heads, config.wiring, config.has_mlp_norm) == (2, "parallel", True)
    config = parse_model_config(
        of("falcon", alibi=True, bias=True, multi_query=False, parallel_attn=False)
    )
    assert (config.num_kv_heads, config.wiring, config.rotary) == (6, "sequential", ())
    assert config.qkv_bias
    assert config.mlp_bias


REFUSED: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    (of("mamba"), UnsupportedModel, "mamba"),
    (of(["llama"]), UnsupportedModel, "supported: bloom"),  # type: ignore[arg-type]
    (of("llama", hidden_act="relu2"), UnsupportedModel, "relu2"),
    (of("llama", hidden_act=[]), UnsupportedModel, "activation"),
    (of("llama", hidden_size=-48), CorruptCheckpoint, "hidden_size"),
    (of("llama", hidden_size=1 << 40), CorruptCheckpoint, "hidden_size"),
    (of("llama", num_hidden_layers=True), CorruptCheckpoint, "num_hidden_layers"),
    (of("llama", num_attention_heads=7), CorruptCheckpoint, "do not divide"),
    (of("llama", num_key_value_heads=4), CorruptCheckpoint, "do not divide"),
    (of("llama", head_dim=7), CorruptCheckpoint, "odd"),
    (of("llama", rms_norm_eps=float("nan")), CorruptCheckpoint, "rms_norm_eps"),
    (of("llama", rms_norm_eps=10**400), CorruptCheckpoint, "a huge number"),
    (of("llama", attention_bias=1), CorruptCheckpoint, "attention_bias"),
    (of("llama", eos_token_id="2"), CorruptCheckpoint, "eos_token_id"),
    (of("llama", partial_rotary_factor=0.5), UnsupportedModel, "part of each head"),
    (of("llama", rope_scaling={"type": "yarn"}), UnsupportedModel, "yarn"),
    (of("llama", rope_scaling=[1]), CorruptCheckpoint, "rotary"),
    (of("llama", rope_parameters={"full_attention": [1]}), CorruptCheckpoint, "rotary"),
    (of("llama", rope_parameters={"rope_theta": 0}), CorruptCheckpoint, "rope_theta"),
    (of("mistral", sliding_window=0), CorruptCheckpoint, "sliding_window"),
    (of("mistral", sliding_window="9"), CorruptCheckpoint, "sliding_window"),
    (of("mistral", sliding_window=9, layer_types=["full_attention"] * 4), UnsupportedModel, "some"),
    (of("mixtral", num_local_experts=5000), CorruptCheckpoint, "num_local_experts"),
    (of("mixtral", num_experts_per_tok=9), CorruptCheckpoint, "from 1 to 8"),
    (of("mixtral", num_local_experts=1), CorruptCheckpoint, "num_experts_per_tok"),
    (of("bloom", n_layer=0), CorruptCheckpoint, "num_hidden_layers"),
    (of("bloom", apply_residual_connection_post_layernorm=1), CorruptCheckpoint, "true or false"),
    (of("falcon", multi_query=1), CorruptCheckpoint, "multi_query"),
    (of("falcon", num_ln_in_parallel_attn=3), CorruptCheckpoint, "from 1 to 2"),
    (of("falcon", num_ln_in_parallel_attn=2), UnsupportedModel, "no Falcon"),
    (
        of("falcon", new_decoder_architecture=True, parallel_attn=False),
        UnsupportedModel,
        "no Falcon",
    ),
    (
        of("falcon", new_decoder_architecture=True, num_kv_heads=4),
        CorruptCheckpoint,
        "do not divide",
    ),
    (of("falcon", num_attention_heads=16), CorruptCheckpoint, "odd"),
    (of("gemma2", attn_logit_softcapping=-1), CorruptCheckpoint, "attn_logit_softcapping"),
    (of("gemma2", final_logit_softcapping="30"), CorruptCheckpoint, "final_logit_softcapping"),
    (of("gemma2", query_pre_attn_scalar=0), CorruptCheckpoint, "query_pre_attn_scalar"),
    (of("gemma2", use_bidirectional_attention=True), UnsupportedModel, "bidirectional"),
    (of("gemma3_text", attn_logit_softcapping=50.0), UnsupportedModel, "attn_logit_softcapping"),
    (of("gemma3_text", sliding_window_pattern=0), CorruptCheckpoint, "sliding_window_pattern"),
    (of("gemma3_text", rope_local_base_freq=-1), CorruptCheckpoint, "rope_local_base_freq"),
    (of("gemma3"), CorruptCheckpoint, "no object text_config"),
    (of("gemma3", text_config=[]), CorruptCheckpoint, "no object text_config"),
    (of("qwen2", use_sliding_window=1), CorruptCheckpoint, "use_sliding_window"),
    (of("qwen2", use_sliding_window=True, max_window_layers=-1), CorruptCheckpoint, "max_window"),
    (of("qwen3", layer_types=["full_attention"] * 3), CorruptCheckpoint, "4 blocks"),
    (of("qwen3", layer_types=["linear_attention"] * 4), UnsupportedModel, "linear_attention"),
    (of("qwen3", layer_types=[{}] * 4), UnsupportedModel, "of the kind"),
    (of("qwen3", layer_types=["sliding_attention"] * 4), CorruptCheckpoint, "how long"),
)


@pytest.mark.parametrize(("raw", "error", "text"), REFUSED, ids=str)
def test_what_cannot_be_is_refused(raw: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        parse_model_config(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_values_are_taken_or_refused(family: str) -> None:
    inner = FAMILIES[family].inner
    for key, odd in itertools.product(KEYS, ODD):
        raw = of(family, **{key: odd} if key != "model_type" else {})
        for given in (raw, {"model_type": family, inner: raw}) if inner else (raw,):
            try:
                config = parse_model_config(given)
            except KernelError:
                continue
            assert config.num_heads % config.num_kv_heads == 0
            assert all(math.prod(shape) > 0 for shape in block_shapes(config, 0).values())


def test_what_only_other_families_have_changes_nothing() -> None:
    raw: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    plain = parse_model_config(raw)
    assert parse_model_config({**raw, "query_pre_attn_scalar": 9, "has_kept_norms": True}) == plain
