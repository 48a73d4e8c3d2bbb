"""What a ``config.json`` may say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kernels.errors import CorruptCheckpoint, UnsupportedModel
from kernels.model_config import parse_model_config

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
)


@pytest.mark.parametrize(("raw", "windows"), WINDOWS, ids=str)
def test_which_blocks_have_a_window(raw: dict[str, Any], windows: tuple[int, ...]) -> None:
    config = parse_model_config(raw)
    assert config.windows == windows
    assert [config.window(block) for block in range(4)] == list(windows or (0,) * 4)


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
