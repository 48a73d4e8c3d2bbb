"""Adapters that work inside the remote blocks, and are trained here.

The numbers stay with the app: servers get them for a while, and give back their gradient. All of
an adapter is one parameter with a row for each block, which an optimiser that works on each number
alone (SGD, Adam, AdamW) treats as it would the matrices.

Shapes: L blocks, E numbers of a block, P prefix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from kernels.adapter import read_parts
from kernels.adapter_form import DOWN, AdapterForm, check_form, layout
from kernels.errors import BadAdapter
from kernels.model_config import ModelConfig
from kernels.peft_files import load_adapter, save_lora, save_prefix
from kernels.weight_names import linear_sizes
from p2p.wire.adapter_messages import AdapterShape

PREFIX_STD = 0.02
"""Keys and values of a prefix begin near zero: attention then takes a share of nearly nothing from
each of its tokens, and the model speaks much as without it."""


class RemoteAdapter(nn.Module):
    """An adapter of all blocks of a model.

    Args:
        config: of the model.
        form: what it consists of.
        values_LE: its numbers at first; copied, as float32 unless they are float64.

    Raises:
        BadAdapter: it does not fit the model.
    """

    def __init__(self, config: ModelConfig, form: AdapterForm, values_LE: torch.Tensor) -> None:
        super().__init__()
        check_form(config, form)
        self.config = config
        self.form = form
        self._parts = layout(config, form)
        elements = sum(part.elements for part in self._parts)
        if tuple(values_LE.shape) != (config.num_blocks, elements):
            raise BadAdapter(
                f"an adapter's numbers have the shape {list(values_LE.shape)}; "
                f"[{config.num_blocks}, {elements}] was expected"
            )
        dtype = torch.float64 if values_LE.dtype == torch.float64 else torch.float32
        self.values = nn.Parameter(values_LE.detach().clone().to(dtype))

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig) -> RemoteAdapter:
        """Reads an adapter that was saved in PEFT's format: LoRA or prefix tuning.

        Raises:
            BadAdapter: it cannot be read, does not fit, or is a soft prompt.
        """
        saved = load_adapter(Path(folder), config)
        if saved.form is None or saved.values_LE is None:
            raise BadAdapter(f"{folder} is a soft prompt; load it with SoftPrompt.from_folder")
        return RemoteAdapter(config, saved.form, saved.values_LE)

    @property
    def shape(self) -> AdapterShape:
        """The form, for the wire."""
        form = self.form
        return AdapterShape(
            targets=form.targets,
            rank=form.rank,
            scaling=form.scaling,
            prefix_tokens=form.prefix_tokens,
        )

    def tensors(self, block: int) -> dict[str, torch.Tensor]:
        """The tensors of one block, by name (``q_proj.lora_A``, ...); views of the parameter."""
        return read_parts(self._parts, self.values[block])

    def save(self, folder: str | Path, *, base_model: str = "") -> None:
        """Writes it in PEFT's format: as LoRA, or as prefix tuning.

        Raises:
            BadAdapter: it is both at once, for which PEFT has no format.
            OSError: it cannot be written.
        """
        if self.form.targets and self.form.prefix_tokens:
            raise BadAdapter("PEFT has no format for low-rank pairs and a prefix in one adapter")
        save = save_lora if self.form.targets else save_prefix
        values_LE = self.values.detach().float()
        save(Path(folder), self.config, self.form, values_LE, base_model=base_model)

    def extra_repr(self) -> str:
        """What it is, for ``repr``."""
        return f"{self.form}, {self.values.numel()} numbers"


class RemoteLora(RemoteAdapter):
    """Low-rank pairs beside the linear layers of the remote blocks.

    Source: Hu et al. 2021, arXiv:2106.09685; the first values are PEFT's: ``A`` Kaiming uniform,
    ``B`` zero, so that it changes nothing at first.

    Args:
        config: of the model.
        rank: of the pairs.
        alpha: the pairs' product is multiplied with ``alpha / rank``.
        targets: names of the linear layers, or ``("all-linear",)``.
        seed: of the first values; none takes torch's generator.

    Raises:
        BadAdapter: the model has no such layers; the text names those that it has.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        seed: int | None = None,
    ) -> None:
        form = AdapterForm(
            targets=_in_order(config, targets), rank=rank, scaling=alpha / rank if rank else 0.0
        )
        parts = layout(config, form)
        values_LE = torch.zeros(config.num_blocks, sum(part.elements for part in parts))
        generator = make_generator(seed)
        for row_E in values_LE:
            for name, tensor in read_parts(parts, row_E).items():
                if name.endswith(f".{DOWN}"):
                    bound = 1 / math.sqrt(tensor.shape[1])  # Kaiming's with a = sqrt(5)
                    tensor.uniform_(-bound, bound, generator=generator)
        super().__init__(config, form, values_LE)


class DeepPrompt(RemoteAdapter):
    """Trainable keys and values that stand before every sequence, in every block.

    Source: prefix tuning, Li and Liang 2021, arXiv:2101.00190; P-tuning v2, Liu et al. 2021,
    arXiv:2110.07602. Without a network that makes them.

    Args:
        config: of the model.
        tokens: how many.
        seed: of the first values; none takes torch's generator.
    """

    def __init__(self, config: ModelConfig, *, tokens: int = 16, seed: int | None = None) -> None:
        form = AdapterForm(prefix_tokens=tokens)
        elements = sum(part.elements for part in layout(config, form))
        values_LE = PREFIX_STD * torch.randn(
            config.num_blocks, elements, generator=make_generator(seed)
        )
        super().__init__(config, form, values_LE)


def make_generator(seed: int | None) -> torch.Generator | None:
    """A generator of a seed; none for torch's own."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def _in_order(config: ModelConfig, targets: Sequence[str]) -> tuple[str, ...]:
    known = tuple(linear_sizes(config))
    if tuple(targets) == ("all-linear",):
        return known
    unknown = [name for name in targets if name not in known]
    if unknown or isinstance(targets, str):
        wrong = targets if isinstance(targets, str) else unknown[0]
        raise BadAdapter(
            f"the model has no linear layer {wrong!r} in its blocks; target modules can be "
            f"{', '.join(known)}, or all-linear"
        )
    return tuple(name for name in known if name in targets)
