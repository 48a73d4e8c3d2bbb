"""Adapters in the files of Hugging Face's PEFT, which is not needed for it.

A folder has an ``adapter_config.json`` and an ``adapter_model.safetensors``. Nothing is ever
unpickled. Names, shapes and dtypes are checked against the model's before a tensor is read, so that
a file never makes more be allocated than an adapter of this model can need. Invariant: what is read
is finite, and has the layout of `kernels.adapter_form`.

Shapes: L blocks, E numbers of a block, P tokens of a prefix or a soft prompt, D hidden size, K key
and value heads, H head size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kernels.adapter import read_parts
from kernels.adapter_form import (
    DOWN,
    MAX_PREFIX_TOKENS,
    UP,
    AdapterForm,
    check_form,
    layout,
    row_elements,
)
from kernels.errors import BadAdapter
from kernels.model_config import ModelConfig
from kernels.peft_config import (
    CONFIG_FILE,
    LORA,
    PREFIX_TUNING,
    PeftSettings,
    format_lora_config,
    format_prefix_config,
    format_prompt_config,
    load_peft_settings,
)
from kernels.weight_names import linear_names, short_name

TENSORS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_PROMPT = "prompt_embeddings"
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """What a folder holds: an adapter of the blocks, or a soft prompt.

    Attributes:
        form: of the adapter; none for a soft prompt.
        values_LE: its numbers, a row for each block of the model, float32 on the CPU, in the order
            of `kernels.adapter_form.layout`; none for a soft prompt.
        prompt_PD: embeddings that stand before every text's, float32 on the CPU; none for an
            adapter of the blocks.
        base_model: what the files call the model that it was trained with; may be empty.
    """

    form: AdapterForm | None
    values_LE: torch.Tensor | None
    prompt_PD: torch.Tensor | None
    base_model: str


def load_adapter(folder: Path, config: ModelConfig) -> SavedAdapter:
    """Reads what PEFT, or one of the functions below, saved.

    Args:
        folder: with both files.
        config: of the model that it is for.

    Raises:
        BadAdapter: the files are missing or damaged, do not fit the model, or hold what is not
            supported; the text says which.
    """
    settings = load_peft_settings(folder)
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise BadAdapter(
            f"{path} is missing; save the adapter with PEFT's save_pretrained (other formats than "
            "safetensors are never read)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return _read(_Tensors(path, file), settings, config)
    except (SafetensorError, OSError) as error:
        raise BadAdapter(f"{path} cannot be read ({str(error)[:200]}); save it again") from error


def save_lora(
    folder: Path,
    config: ModelConfig,
    form: AdapterForm,
    values_LE: torch.Tensor,
    *,
    base_model: str,
) -> None:
    """Writes low-rank pairs so that PEFT's ``PeftModel.from_pretrained`` reads them.

    Args:
        folder: made where it is missing; an adapter in it is replaced.
        config: of the model.
        form: without a prefix, which PEFT keeps on its own.
        values_LE: a row for each block of the model, of any floating-point dtype, on any device.
        base_model: what to call the model in the files.

    Raises:
        BadAdapter: the numbers do not fit form and model, or there is a prefix among them.
        OSError: the disk is full, or the folder cannot be written.
    """
    if form.prefix_tokens:
        raise BadAdapter("PEFT keeps a prefix and low-rank pairs in two adapters; save each alone")
    _check_values(config, form, values_LE)
    parts = layout(config, form)
    label_of = {short_name(label): label for label in linear_names(config)}
    tensors: dict[str, torch.Tensor] = {}
    for block, row_E in enumerate(values_LE.detach().to(device="cpu", dtype=torch.float32)):
        for name, tensor in read_parts(parts, row_E).items():
            target, _, side = name.rpartition(".")
            tensors[_tensor_name(label_of[target], block, side)] = tensor
    _save(folder, tensors, format_lora_config(form, base_model))


def save_prefix(
    folder: Path,
    config: ModelConfig,
    form: AdapterForm,
    values_LE: torch.Tensor,
    *,
    base_model: str,
) -> None:
    """Writes a prefix of keys and values so that PEFT's ``PeftModel.from_pretrained`` reads it.

    Args:
        folder: made where it is missing; an adapter in it is replaced.
        config: of the model.
        form: without low-rank pairs, which PEFT keeps on their own.
        values_LE: a row for each block of the model, of any floating-point dtype, on any device.
        base_model: what to call the model in the files.

    Raises:
        BadAdapter: the numbers do not fit form and model, or there are pairs among them.
        OSError: the disk is full, or the folder cannot be written.
    """
    if form.targets:
        raise BadAdapter("PEFT keeps a prefix and low-rank pairs in two adapters; save each alone")
    _check_values(config, form, values_LE)
    _check_prefix(config)
    tokens = form.prefix_tokens
    # A row has the keys of all tokens, then the values; PEFT has all blocks of a token together.
    rows = values_LE.detach().reshape(2 * config.num_blocks, tokens, config.kv_size)
    prompt = rows.transpose(0, 1).reshape(tokens, -1)
    _save(folder, {_PROMPT: prompt}, format_prefix_config(config, tokens, base_model))


def save_soft_prompt(
    folder: Path, config: ModelConfig, prompt_PD: torch.Tensor, *, base_model: str
) -> None:
    """Writes a soft prompt so that PEFT's ``PeftModel.from_pretrained`` reads it.

    Args:
        folder: made where it is missing; an adapter in it is replaced.
        config: of the model.
        prompt_PD: of any floating-point dtype, on any device.
        base_model: what to call the model in the files.

    Raises:
        BadAdapter: it does not fit the model.
        OSError: the disk is full, or the folder cannot be written.
    """
    if prompt_PD.dim() != 2 or prompt_PD.shape[1] != config.hidden_size:
        raise BadAdapter(
            f"the soft prompt has the shape {list(prompt_PD.shape)}; "
            f"[tokens, {config.hidden_size}] was expected"
        )
    tokens = prompt_PD.shape[0]
    if not 1 <= tokens <= MAX_PREFIX_TOKENS:
        raise BadAdapter(f"a soft prompt of {tokens} tokens; expected 1 to {MAX_PREFIX_TOKENS}")
    text = format_prompt_config(config, tokens, base_model)
    _save(folder, {_PROMPT: prompt_PD.detach()}, text)


class _Tensors:
    """An open file's tensors; each is checked before it is read."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file  # as `safe_open` gives it, which has no types
        self.names = frozenset(file.keys())

    def check_names(self, expected: frozenset[str]) -> None:
        for word, names in (
            ("lacks", expected - self.names),
            ("has, beyond what is supported,", self.names - expected),
        ):
            if names:
                raise BadAdapter(
                    f"{self.path} {word} {len(names)} tensors, such as {min(names)[:128]!r}; "
                    "the same linear layers of every block were expected, and nothing else"
                )

    def read(self, name: str, expected: tuple[int, ...]) -> torch.Tensor:
        view = self._file.get_slice(name)
        shape = tuple(view.get_shape())
        if shape != expected:
            raise BadAdapter(
                f"in {self.path}, {name} has the shape {list(shape)}; "
                f"the model and {CONFIG_FILE} imply {list(expected)}"
            )
        if view.get_dtype() not in _DTYPES:
            raise BadAdapter(
                f"in {self.path}, {name} has the dtype {view.get_dtype()}; "
                f"one of {', '.join(_DTYPES)} was expected"
            )
        tensor: torch.Tensor = self._file.get_tensor(name).float()
        if not torch.isfinite(tensor).all():
            raise BadAdapter(
                f"in {self.path}, {name} has numbers that are not finite; "
                "take an earlier state of the training"
            )
        return tensor


def _read(tensors: _Tensors, settings: PeftSettings, config: ModelConfig) -> SavedAdapter:
    if settings.kind == LORA:
        form = _lora_form(tensors, settings, config)
        return SavedAdapter(form, _read_lora(tensors, form, config), None, settings.base_model)
    tokens = settings.virtual_tokens
    tensors.check_names(frozenset((_PROMPT,)))
    if settings.kind == PREFIX_TUNING:
        form = AdapterForm(prefix_tokens=tokens)
        check_form(config, form)
        _check_prefix(config)
        prompt = tensors.read(_PROMPT, (tokens, 2 * config.num_blocks * config.kv_size))
        rows = prompt.view(tokens, 2 * config.num_blocks, config.kv_size).transpose(0, 1)
        return SavedAdapter(form, rows.reshape(config.num_blocks, -1), None, settings.base_model)
    prompt_PD = tensors.read(_PROMPT, (tokens, config.hidden_size))
    return SavedAdapter(None, None, prompt_PD, settings.base_model)


def _lora_form(tensors: _Tensors, settings: PeftSettings, config: ModelConfig) -> AdapterForm:
    """Which layers have pairs, by what is there; all blocks must have the same."""
    labels = linear_names(config)
    found = [
        label
        for label in labels
        if any(
            _tensor_name(label, block, DOWN) in tensors.names for block in range(config.num_blocks)
        )
    ]
    if not found:
        raise BadAdapter(
            f"none of the {len(tensors.names)} tensors of {tensors.path} is of this model; "
            f"one called like {_tensor_name(labels[0], 0, DOWN)} was expected"
        )
    expected = frozenset(
        _tensor_name(label, block, side)
        for label in found
        for block in range(config.num_blocks)
        for side in (DOWN, UP)
    )
    tensors.check_names(expected)
    form = AdapterForm(
        targets=tuple(short_name(label) for label in found),
        rank=settings.rank,
        scaling=settings.scaling,
    )
    check_form(config, form)
    return form


def _read_lora(tensors: _Tensors, form: AdapterForm, config: ModelConfig) -> torch.Tensor:
    label_of = {short_name(label): label for label in linear_names(config)}
    values_LE = torch.empty(config.num_blocks, row_elements(config, form))
    parts = layout(config, form)
    for block, row_E in enumerate(values_LE):
        for name, part in read_parts(parts, row_E).items():
            target, _, side = name.rpartition(".")
            part.copy_(tensors.read(_tensor_name(label_of[target], block, side), tuple(part.shape)))
    return values_LE


def _tensor_name(label: str, block: int, side: str) -> str:
    return f"{_PREFIX}{label.format(block=block)}.{side}.weight"


def _check_prefix(config: ModelConfig) -> None:
    """PEFT's prefixes are what Hugging Face caches; that is once what is cached here, repeated."""
    if config.family == "falcon" and 1 < config.num_kv_heads < config.num_heads:
        raise BadAdapter(
            "a prefix of a Falcon with groups of heads is another one in PEFT than here; "
            "take low-rank pairs for this model"
        )


def _check_values(config: ModelConfig, form: AdapterForm, values_LE: torch.Tensor) -> None:
    expected = (config.num_blocks, row_elements(config, form))
    if tuple(values_LE.shape) != expected:
        raise BadAdapter(
            f"the adapter's numbers have the shape {list(values_LE.shape)}; "
            f"{list(expected)} was expected, a row for each block of the model"
        )


def _save(folder: Path, tensors: Mapping[str, torch.Tensor], config_text: str) -> None:
    """Both files, each whole or not at all; the configuration last, for it is read first."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: tensor.to(device="cpu", dtype=torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        try:
            # Not by safetensors' own way to a file, which nobody but its owner could read: the
            # daemon that is to use the adapter may be another user.
            data = save(plain, metadata={"format": "pt"})
            (Path(scratch) / TENSORS_FILE).write_bytes(data)
        except SafetensorError as error:
            raise OSError(f"{folder / TENSORS_FILE} cannot be written ({error})") from error
        (Path(scratch) / CONFIG_FILE).write_text(config_text)
        for name in (TENSORS_FILE, CONFIG_FILE):
            os.replace(Path(scratch) / name, folder / name)
