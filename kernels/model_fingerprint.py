"""The fingerprint of a model: what peers compare before they work together.

Peers whose weights or arithmetic differ would give nonsense together, so the fingerprint covers
the configuration and the SHA-256 of every weight file. It covers nothing else: not names, not
dates, not the folder, not how a server quantises. Files count by their hashes only, in sorted
order.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kernels.errors import CorruptCheckpoint

INDEX_NAME = "model.safetensors.index.json"
WHOLE_NAME = "model.safetensors"

_VERSION = "petald model 1"

# Keys that say nothing about the arithmetic of a forward pass. All others count, known or not: an
# unknown key that splits a swarm is a nuisance, one that is wrongly ignored mixes two models.
_IGNORED_KEYS = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
        "architectures", "attention_dropout", "attn_implementation", "auto_map", "bos_token_id",
        "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range", "label2id",
        "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
        "problem_type", "return_dict", "task_specific_params", "tokenizer_class", "torch_dtype",
        "transformers.js_config", "transformers_version", "use_cache",
    }
)  # fmt: skip

_WEIGHT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
_MAX_JSON_BYTES = 64 * 2**20


def is_weight_name(name: str) -> bool:
    """Whether `name` is a safetensors file's plain name: not a path, not hidden."""
    return _WEIGHT_NAME.fullmatch(name) is not None and ".." not in name


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CorruptCheckpoint: It does not, or is not there.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptCheckpoint(f"{path} is larger than {_MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def weight_file_names(folder: Path) -> list[str]:
    """The weight files that make up the model in `folder`, whether they are there or not.

    Raises:
        CorruptCheckpoint: There is no safetensors file, or the index is bad.
    """
    index = folder / INDEX_NAME
    if index.exists():
        return weight_names_of_index(read_json_object(index), str(index))
    if (folder / WHOLE_NAME).exists():
        return [WHOLE_NAME]
    names = sorted(path.name for path in folder.glob("*.safetensors") if is_weight_name(path.name))
    if not names:
        raise CorruptCheckpoint(f"{folder} holds no safetensors file")
    return names


def weight_names_of_index(index: Mapping[str, Any], origin: str) -> list[str]:
    """The weight files that a safetensors index names.

    Args:
        index: The parsed index.
        origin: Where it came from, for the error's text.

    Raises:
        CorruptCheckpoint: It names none, or something that is not a plain file name.
    """
    weight_map = index.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and is_weight_name(name) for name in names):
        raise CorruptCheckpoint(f"{origin} does not name safetensors files of its own folder")
    return sorted(set(names))


def fingerprint_of(config: Mapping[str, Any], weight_hashes: Iterable[str]) -> str:
    """The fingerprint, from a parsed ``config.json`` and the SHA-256 of each weight file.

    Raises:
        CorruptCheckpoint: The configuration holds a number that is none.
    """
    lines = [_VERSION, canonical_config(config), *sorted(weight_hashes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def canonical_config(config: Mapping[str, Any]) -> str:
    """One text for all spellings of a configuration: sorted, without nulls and ignored keys."""
    kept = {key: value for key, value in config.items() if key not in _IGNORED_KEYS}
    try:
        return json.dumps(_canonical(kept), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise CorruptCheckpoint(f"the model's config.json holds {error}") from error


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_canonical(one) for one in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 10000 and 10000.0 are one setting
    return value
