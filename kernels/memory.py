"""Memory that is short, and memory that the C library keeps for later."""

from __future__ import annotations

import contextlib
import ctypes

import torch


def give_back_free_memory() -> None:
    """Gives back what is free; does nothing where the C library has no way to.

    Quantising leaves blocks of some MiB behind, free but within the heap, which glibc would keep:
    without this a process holds twice the bytes of its 4-bit weights.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_short_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left, whoever noticed that.

    The allocator of a CPU has no class of its own for it, nor have cuBLAS's handles.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    told = str(error) if isinstance(error, RuntimeError) else ""
    return "allocate memory" in told or "ALLOC_FAILED" in told
