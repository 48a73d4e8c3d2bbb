"""Tensors between torch and the daemon's socket."""

from __future__ import annotations

import warnings

import torch

from p2p.wire.tensor import WireTensor

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

with warnings.catch_warnings():
    # torch says once in a process that bytes are read-only. Nothing here writes to them, so it is
    # told now: changing the filters for each tensor would be slow, and seen by other threads.
    warnings.simplefilter("ignore", UserWarning)
    torch.frombuffer(b"\0", dtype=torch.uint8)


def to_wire(tensor: torch.Tensor) -> WireTensor:
    """A tensor as it is in memory; shares it where it is contiguous and on the CPU."""
    plain = tensor.detach().cpu().contiguous()
    dtype = str(plain.dtype).removeprefix("torch.")
    data = plain.view(-1).view(torch.uint8).numpy().data.cast("B")
    return WireTensor(dtype, tuple(plain.shape), data)


def from_wire(tensor: WireTensor) -> torch.Tensor:
    """The tensor that came from the daemon; shares its memory, read-only."""
    dtype = DTYPES[tensor.dtype]
    data = torch.frombuffer(tensor.data, dtype=torch.uint8)
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(tensor.shape)


def mask_to_wire(mask_BS: torch.Tensor) -> WireTensor | None:
    """An attention mask of zeros and ones, or booleans; none where it has no zero."""
    mask_BS = mask_BS != 0
    if bool(mask_BS.all()):
        return None
    return to_wire(mask_BS.to(torch.uint8))
