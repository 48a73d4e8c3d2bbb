"""Where attention of decode steps is a GPU's kernel, which takes all sequences at once.

Whether there is one is found out when blocks are made, by a try: so it is compiled before the first
step, and a machine where it cannot be (Triton needs a C compiler) does without it. Other numbers
of sequences may take another variant of it, which is compiled when they come, and may fail then.

Shapes: S rows, one for each sequence, K key and value heads, T tokens of the arena, H head size.
"""

from __future__ import annotations

import functools
import importlib
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Protocol

import torch

log = logging.getLogger(__name__)

DecodeKernel = Callable[
    [
        tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        tuple[torch.Tensor, torch.Tensor],
        torch.Tensor,
        float | None,
        int,
    ],
    torch.Tensor,
]
"""Writes new keys and values, and attends; see `kernels.triton.decode_attention.attend`."""

_LEAST_CAPABILITY = {False: (7, 5), True: (8, 0)}
"""Of GPUs, without and with bfloat16: those whose tensor cores Triton's products are for."""


def kernel_failures() -> tuple[type[Exception], ...]:
    """What is raised where a kernel cannot be compiled or started; for an ``except``.

    Triton's own errors are plain exceptions. They are among these where it was imported: who never
    did meets none of them. A want of memory is among them, too.
    """
    errors = sys.modules.get("triton.errors")
    own = () if errors is None else (errors.TritonError,)
    return (*own, RuntimeError, OSError, subprocess.SubprocessError)


def tell_failure(error: Exception) -> None:
    """Says that attention goes on without the kernel, and why."""
    log.warning("sessions are attended to one after the other: %s", str(error)[:500])


class Placed(Protocol):
    """Where a sequence is in the arena; a `kernels.block.Place`."""

    @property
    def offset(self) -> int:
        """Its first position."""
        ...

    @property
    def length(self) -> int:
        """How many tokens are cached."""
        ...


def place_rows(places: Sequence[Placed], device: torch.device) -> torch.Tensor:
    """Offsets and lengths as a kernel reads them, ``[2, S]``, on the device."""
    rows = [[place.offset for place in places], [place.length for place in places]]
    # Not waiting: it is so small that it is out of this memory when the call returns.
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


@functools.cache
def find_decode_kernel(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_size: int
) -> DecodeKernel | None:
    """The kernel for blocks with such heads; none where there is none, which is no error.

    Args:
        device: of the blocks.
        dtype: of keys and values.
        heads: of queries.
        kv_heads: of keys and values.
        head_size: of each.

    Raises:
        torch.OutOfMemoryError: there is no memory for the try.
    """
    if device.type != "cuda":
        return None
    try:
        kernels: ModuleType = importlib.import_module("kernels.triton.decode_attention")
        importlib.import_module("triton.errors")
    except ImportError:
        return None
    if not kernels.can_attend(dtype, heads, kv_heads, head_size):
        return None
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY[dtype == torch.bfloat16]:
        return None
    found: DecodeKernel = kernels.attend
    try:
        _try_out(found, device, dtype, (heads, kv_heads, head_size))
    except torch.OutOfMemoryError:  # which has nothing to do with the kernel
        raise
    except kernel_failures() as error:
        tell_failure(error)
        return None
    return found


def _try_out(
    kernel: DecodeKernel, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    heads, kv_heads, head_size = shape

    def zeros(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    cache_KTH = zeros(kv_heads, 64, head_size), zeros(kv_heads, 64, head_size)
    projected = tuple(zeros(1, count, head_size) for count in (heads, kv_heads, kv_heads))
    places_2S = torch.tensor([[0], [32]], device=device)
    output_SA = kernel((projected[0], projected[1], projected[2]), cache_KTH, places_2S, None, 0)
    if bool(output_SA.any().item()):
        raise RuntimeError("the kernel did not give zeros for zeros")
