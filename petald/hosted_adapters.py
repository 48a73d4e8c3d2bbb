"""The adapters that a server hosts itself, from the folders that its configuration names.

Each is known by two names: the plain one, as its owner and users say it, and the full one with its
digest, by which routes are chosen, so that one job never crosses servers with different numbers.

Shapes: L blocks, E numbers of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, adapter_digest
from kernels.errors import BadAdapter
from kernels.model_config import ModelConfig
from kernels.peft_files import load_adapter
from kernels.span import Span
from petald.adapter_store import adapter_rows
from petald.errors import ConfigError
from petald.swarm import adapter_full_name


@dataclass(frozen=True, kw_only=True, slots=True)
class HostedAdapter:
    """One adapter, of all the model's blocks.

    Attributes:
        name: as the configuration gives it.
        full_name: with the digest.
        form: what it consists of.
        values_LE: float32, on the CPU.
    """

    name: str
    full_name: str
    form: AdapterForm
    values_LE: torch.Tensor


def read_adapters(texts: Sequence[str], config: ModelConfig) -> tuple[HostedAdapter, ...]:
    """Reads the configured adapters.

    Args:
        texts: ``NAME=FOLDER`` each.
        config: of the model that is served.

    Raises:
        ConfigError: one cannot be read, does not fit the model, or cannot be hosted.
    """
    adapters = []
    for text in texts:
        name, _, folder = text.partition("=")
        adapters.append(_read(name, folder, config))
    return tuple(adapters)


def place_adapters(adapters: Sequence[HostedAdapter], span: Span) -> dict[str, SpanAdapter]:
    """The adapters' parts for a span, on its device, by the plain and by the full names."""
    placed = {}
    for adapter in adapters:
        values_LE = adapter.values_LE[span.start : span.end].to(span.device, span.dtype, copy=True)
        part = SpanAdapter(span.config, adapter.form, span.start, values_LE)
        placed[adapter.name] = placed[adapter.full_name] = part
    return placed


def _read(name: str, folder: str, config: ModelConfig) -> HostedAdapter:
    try:
        saved = load_adapter(Path(folder).expanduser(), config)
    except BadAdapter as error:
        raise ConfigError(f"[serve] adapters: {name} cannot be hosted: {error}") from error
    if saved.form is None or saved.values_LE is None:
        raise ConfigError(
            f"[serve] adapters: {name} is a soft prompt, which is the client's part; "
            "host a LoRA or a prefix"
        )
    rows = adapter_rows(saved.values_LE)
    digest = adapter_digest(
        saved.form, start=0, end=config.num_blocks, dtype=rows.dtype, data=rows.data
    )
    return HostedAdapter(
        name=name,
        full_name=adapter_full_name(name, digest),
        form=saved.form,
        values_LE=saved.values_LE,
    )
