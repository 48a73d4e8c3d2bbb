"""What an adapter adds to each block, and how its numbers are laid out. Standard library only.

An adapter has the same parts in every block: pairs of low-rank matrices beside some of the linear
layers (LoRA), keys and values that stand before every sequence (a prefix), or both. All numbers of
one block are one row; so the part of an adapter that belongs to a span is some rows of it.
Invariant: the parts of a layout fill a row without gaps.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from kernels.errors import BadAdapter
from kernels.model_config import ModelConfig
from kernels.weight_names import linear_sizes

MAX_RANK = 1024
MAX_PREFIX_TOKENS = 4096
DOWN, UP = "lora_A", "lora_B"
PREFIX_KEYS, PREFIX_VALUES = "prefix_keys", "prefix_values"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterForm:
    """An adapter without its numbers.

    Attributes:
        targets: the linear layers with a low-rank pair, by their names in the checkpoint
            (``q_proj``, ...), in the order of `kernels.weight_names.linear_sizes`.
        rank: of the pairs; 0 where there is no target.
        scaling: what their product is multiplied with: PEFT's ``lora_alpha / r``.
        prefix_tokens: keys and values before every sequence.
    """

    targets: tuple[str, ...] = ()
    rank: int = 0
    scaling: float = 1.0
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a block's row.

    Attributes:
        name: ``q_proj.lora_A``, ``prefix_keys``, ...
        shape: its own.
        offset: of its first number in the row.
    """

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def check_form(config: ModelConfig, form: AdapterForm) -> None:
    """Checks that an adapter fits a model.

    Raises:
        BadAdapter: it does not; the text says what would.
    """
    known = tuple(linear_sizes(config))
    unknown = [name for name in form.targets if name not in known]
    if unknown:
        raise BadAdapter(
            f"the model has no linear layer {unknown[0][:64]!r} in its blocks; "
            f"target modules can be {', '.join(known)}"
        )
    if form.targets != tuple(name for name in known if name in form.targets):
        raise BadAdapter(f"target modules must come once each, in the order {', '.join(known)}")
    if bool(form.targets) != bool(form.rank) or not 0 <= form.rank <= MAX_RANK:
        raise BadAdapter(
            f"rank {form.rank} with {len(form.targets)} target modules; "
            f"expected 1 to {MAX_RANK} with some, or 0 with none"
        )
    if not 0 <= form.prefix_tokens <= MAX_PREFIX_TOKENS:
        raise BadAdapter(
            f"a prefix of {form.prefix_tokens} tokens; expected at most {MAX_PREFIX_TOKENS}"
        )
    if not form.targets and not form.prefix_tokens:
        raise BadAdapter("an adapter without target modules and without a prefix does nothing")
    if not math.isfinite(form.scaling):
        raise BadAdapter(f"a scaling of {form.scaling}; expected a finite number")


def layout(config: ModelConfig, form: AdapterForm) -> tuple[Part, ...]:
    """The parts of one block's row, in their order.

    Raises:
        BadAdapter: the adapter does not fit the model.
    """
    check_form(config, form)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    sizes = linear_sizes(config)
    for name in form.targets:
        size_in, size_out = sizes[name]
        shapes.append((f"{name}.{DOWN}", (form.rank, size_in)))
        shapes.append((f"{name}.{UP}", (size_out, form.rank)))
    if form.prefix_tokens:
        prefix = (form.prefix_tokens, config.num_kv_heads, config.head_size)
        shapes += [(PREFIX_KEYS, prefix), (PREFIX_VALUES, prefix)]
    parts: list[Part] = []
    offset = 0
    for name, shape in shapes:
        parts.append(Part(name, shape, offset))
        offset += parts[-1].elements
    return tuple(parts)


def row_elements(config: ModelConfig, form: AdapterForm) -> int:
    """How many numbers one block's row has.

    Raises:
        BadAdapter: the adapter does not fit the model.
    """
    return sum(part.elements for part in layout(config, form))


def adapter_digest(
    form: AdapterForm, *, start: int, end: int, dtype: str, data: bytes | memoryview
) -> bytes:
    """What an adapter's part for the blocks ``[start, end)`` is known by: a SHA-256.

    Args:
        form: of the adapter.
        start: first block.
        end: the block after the last one.
        dtype: of the numbers, by torch's name for it.
        data: the rows of these blocks, as they are in memory.
    """
    said = (form.targets, form.rank, float(form.scaling), form.prefix_tokens, start, end, dtype)
    digest = hashlib.sha256(repr(said).encode())
    digest.update(data)
    return digest.digest()
