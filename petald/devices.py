"""Devices and dtypes as the configuration names them."""

from __future__ import annotations

import gc
import os

import torch

from kernels.memory import give_back_free_memory
from petald.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'device = "{name}", but PyTorch finds no CUDA device; use "cpu"')
    return device


def parse_dtype(name: str, device: torch.device, *, quant: str = "none") -> torch.dtype:
    """The dtype of a name; ``auto`` is bfloat16 on a GPU, and float32 on a CPU.

    Quantised weights are multiplied in bfloat16 on a CPU too: that is what its kernels take.
    """
    if name == "auto":
        is_wide = device.type != "cuda" and quant == "none"
        return torch.float32 if is_wide else torch.bfloat16
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in configuration and announcements."""
    return str(dtype).removeprefix("torch.")


def free_memory_bytes(device: torch.device) -> int:
    """What is free on the device now, with what torch keeps for later of what it has freed."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def give_memory_back(device: torch.device) -> None:
    """Gives to the system what is free within this process alone.

    Takes tens of milliseconds: what was interrupted while it loaded hangs together in cycles.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back_free_memory()
