"""What an ``adapter_config.json`` says: the part of Hugging Face's PEFT that is supported here.

Standard library only. Of the many things that PEFT can do to a model, those that only add low-rank
pairs, a prefix or a soft prompt are read; whatever else would change what the model computes is
refused by its name. Invariant: the numbers of a `PeftSettings` are within the bounds of
`kernels.adapter_form`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.adapter_form import MAX_PREFIX_TOKENS, MAX_RANK, AdapterForm
from kernels.errors import BadAdapter
from kernels.model_config import ModelConfig

CONFIG_FILE = "adapter_config.json"
LORA, PREFIX_TUNING, PROMPT_TUNING = "LORA", "PREFIX_TUNING", "PROMPT_TUNING"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_ALPHA = 1e6
# Of PEFT 0.21: each of these, when set, makes the adapter more than low-rank pairs in every block.
_MUST_BE_UNSET = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_qalora",
    "use_bdlora",
    "prefix_projection",
)
# Of PEFT 0.21: any other way to begin (pissa, olora, loftq, ...) changes the model's own weights.
_HARMLESS_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftSettings:
    """A configuration that was read.

    Attributes:
        kind: `LORA`, `PREFIX_TUNING` or `PROMPT_TUNING`.
        rank: of a LoRA; else 0.
        scaling: what the product of a pair is multiplied with.
        virtual_tokens: of a prefix or a soft prompt; else 0.
        base_model: the model that the file names, or nothing.
    """

    kind: str
    rank: int = 0
    scaling: float = 1.0
    virtual_tokens: int = 0
    base_model: str = ""


def load_peft_settings(folder: Path) -> PeftSettings:
    """Reads an adapter folder's ``adapter_config.json``.

    Raises:
        BadAdapter: there is none, it is damaged, or it describes what is not supported.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise BadAdapter(f"{path} is missing; this is no folder that PEFT saved an adapter in")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
        if len(data) > _MAX_CONFIG_BYTES:
            raise BadAdapter(f"{path} has more than {_MAX_CONFIG_BYTES} bytes; save it again")
        raw = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise BadAdapter(f"{path} cannot be read ({str(error)[:200]}); save it again") from error
    if not isinstance(raw, dict):
        raise BadAdapter(f"{path} holds no JSON object; save the adapter again with PEFT")
    return parse_peft_settings(raw)


def parse_peft_settings(raw: Mapping[str, Any]) -> PeftSettings:
    """Reads a configuration that was parsed as JSON.

    Raises:
        BadAdapter: it is damaged, or describes what is not supported.
    """
    kind = raw.get("peft_type")
    if kind not in (LORA, PREFIX_TUNING, PROMPT_TUNING):
        raise BadAdapter(
            f"an adapter of the type {_quote(kind)} is not supported; "
            f"supported: {LORA}, {PREFIX_TUNING}, {PROMPT_TUNING}"
        )
    for name in _MUST_BE_UNSET:
        value = raw.get(name)
        if not (value is None or value is False or value == {} or value == []):
            raise BadAdapter(
                f"{CONFIG_FILE} says {name} = {_quote(value)}, which is not supported; "
                "train the adapter without it"
            )
    base_model = raw.get("base_model_name_or_path") or ""
    if not isinstance(base_model, str):
        raise BadAdapter(f"{CONFIG_FILE} names {_quote(base_model)} as the base model; not a text")
    if kind == LORA:
        rank = _read_count(raw, "r", MAX_RANK)
        return PeftSettings(
            kind=LORA, rank=rank, scaling=_read_scaling(raw, rank), base_model=base_model
        )
    tokens = _read_count(raw, "num_virtual_tokens", MAX_PREFIX_TOKENS)
    return PeftSettings(kind=kind, virtual_tokens=tokens, base_model=base_model)


def format_lora_config(form: AdapterForm, base_model: str) -> str:
    """The configuration that PEFT reads for low-rank pairs."""
    alpha = form.scaling * form.rank
    return _format(
        base_model,
        peft_type=LORA,
        r=form.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        target_modules=list(form.targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=False,
        init_lora_weights=True,
        use_dora=False,
        use_rslora=False,
        modules_to_save=None,
    )


def format_prefix_config(config: ModelConfig, tokens: int, base_model: str) -> str:
    """The configuration that PEFT reads for a prefix of keys and values."""
    return _format(
        base_model,
        peft_type=PREFIX_TUNING,
        num_virtual_tokens=tokens,
        token_dim=config.kv_size,
        num_attention_heads=config.num_kv_heads,
        num_layers=config.num_blocks,
        num_transformer_submodules=1,
        encoder_hidden_size=config.kv_size,
        prefix_projection=False,
    )


def format_prompt_config(config: ModelConfig, tokens: int, base_model: str) -> str:
    """The configuration that PEFT reads for a soft prompt."""
    return _format(
        base_model,
        peft_type=PROMPT_TUNING,
        num_virtual_tokens=tokens,
        token_dim=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_layers=config.num_blocks,
        num_transformer_submodules=1,
        prompt_tuning_init="RANDOM",
    )


def _format(base_model: str, **settings: Any) -> str:
    common = {
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }
    return json.dumps(common | settings, indent=2, sort_keys=True) + "\n"


def _read_scaling(raw: Mapping[str, Any], rank: int) -> float:
    if raw.get("bias", "none") != "none":
        raise BadAdapter(
            f"{CONFIG_FILE} says bias = {_quote(raw['bias'])}; only 'none' is supported, "
            "for the model's own biases are everyone's"
        )
    beginning = raw.get("init_lora_weights")
    if not any(beginning is each or beginning == each for each in _HARMLESS_BEGINNINGS):
        raise BadAdapter(
            f"{CONFIG_FILE} says init_lora_weights = {_quote(beginning)}, which changes the "
            "model's own weights; let PEFT convert it to a plain LoRA when it saves it "
            "(path_initial_model_for_weight_conversion)"
        )
    alpha: Any = raw.get("lora_alpha")
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not -_MAX_ALPHA <= alpha <= _MAX_ALPHA:
        raise BadAdapter(
            f"{CONFIG_FILE} says lora_alpha = {_quote(alpha)}; a number up to {_MAX_ALPHA:.0f} "
            "was expected"
        )
    is_stabilised = raw.get("use_rslora") or False
    if not isinstance(is_stabilised, bool):
        raise BadAdapter(
            f"{CONFIG_FILE} says use_rslora = {_quote(is_stabilised)}; true or false was expected"
        )
    # The second: Kalajdzievski 2023, arXiv:2312.03732.
    return float(alpha / math.sqrt(rank) if is_stabilised else alpha / rank)


def _read_count(raw: Mapping[str, Any], key: str, most: int) -> int:
    value = raw.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise BadAdapter(
            f"{CONFIG_FILE} says {key} = {_quote(value)}; "
            f"a whole number from 1 to {most} was expected"
        )
    return value


def _quote(value: object) -> str:
    """A value from a file, short enough for an error."""
    if type(value) is int and abs(value) > 10**18:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
