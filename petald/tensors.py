"""Hidden states between torch and the wire.

The only place where a tensor of a peer becomes one of torch's. Invariant: what `from_wire` gives
has the shape that was expected, and is finite.

Shapes: S tokens, D hidden size.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import trio

from kernels.codecs.codec import Codec
from kernels.codecs.registry import find_codec
from kernels.errors import UnknownCodec
from p2p.errors import RemoteProtocolError
from p2p.wire.tensor import RAW, WireTensor

WIRE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

LARGE_BYTES = 1 << 20
"""Going over so many takes some tenths of a millisecond, as handing them to a thread does."""

T = TypeVar("T")

_SUM_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32}

if sys.byteorder != "little":
    raise ImportError("petald sends tensors as they are in memory, and needs a little-endian host")

with warnings.catch_warnings():
    # torch says once in a process that bytes are read-only. Nothing here writes to them, so it is
    # told now; changing the filters at each step would be slow, and seen by other threads.
    warnings.simplefilter("ignore", UserWarning)
    torch.frombuffer(b"\0", dtype=torch.uint8)


def to_wire(hidden_SD: torch.Tensor, codec: str = RAW) -> WireTensor:
    """Hidden states in their own dtype, encoded; shares their memory where the codec can.

    Raises:
        UnknownCodec: there is none of that name.
    """
    dtype = str(hidden_SD.dtype).removeprefix("torch.")
    data_SR = find_codec(codec).encode(hidden_SD)
    return WireTensor(dtype, tuple(hidden_SD.shape), data_SR.numpy().data.cast("B"), codec)


def check_wire(tensor: WireTensor, *, hidden_size: int, max_tokens: int) -> Codec:
    """Checks that hidden states have the form that they say, without decoding them.

    Args:
        tensor: as it came.
        hidden_size: that it must have.
        max_tokens: that it may have; one is the least.

    Raises:
        RemoteProtocolError: they are something else.
    """
    shape = tensor.shape
    if len(shape) != 2 or shape[1] != hidden_size or not 1 <= shape[0] <= max_tokens:
        raise RemoteProtocolError(
            f"hidden states of the shape {list(shape)} came; "
            f"[1 to {max_tokens}, {hidden_size}] was expected"
        )
    wire_dtype = _wire_dtype(tensor.dtype)
    try:
        codec = find_codec(tensor.codec)
    except UnknownCodec as error:
        raise RemoteProtocolError(str(error)) from error
    expected_bytes = shape[0] * codec.row_bytes(hidden_size, wire_dtype)
    if len(tensor.data) != expected_bytes:
        raise RemoteProtocolError(
            f"{len(tensor.data)} bytes of {codec.name} came; {shape[0]} rows take {expected_bytes}"
        )
    return codec


def from_wire(
    tensor: WireTensor,
    *,
    hidden_size: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Checks and decodes hidden states, ``[tokens, hidden]``.

    The result may share the wire tensor's memory: read it, do not write to it.

    Args:
        tensor: as it came.
        hidden_size: that it must have.
        max_tokens: that it may have; one is the least.
        dtype: of the result.
        device: likewise.

    Raises:
        RemoteProtocolError: it is something else, or holds numbers that are not finite.
    """
    rows_SD = _decode(tensor, hidden_size, max_tokens).to(dtype)
    _check_finite(rows_SD)
    return rows_SD.to(device)


def check_rows(tensor: WireTensor, *, hidden_size: int, max_tokens: int) -> None:
    """Checks all that `from_wire` does, for hidden states that are kept as they came.

    Raises:
        RemoteProtocolError: they are something else, or hold numbers that are not finite.
    """
    _check_finite(_decode(tensor, hidden_size, max_tokens))


def plain_tensor(tensor: WireTensor) -> torch.Tensor:
    """A tensor of floats of any shape that came uncompressed; shares its memory, read-only.

    Raises:
        RemoteProtocolError: it is none.
    """
    dtype = _wire_dtype(tensor.dtype)
    if tensor.codec != RAW:
        raise RemoteProtocolError(f"a tensor came as {tensor.codec[:32]!r}; raw was expected")
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=dtype)
    data = torch.frombuffer(tensor.data, dtype=torch.uint8)
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(tensor.shape)


def slice_rows(tensor: WireTensor, rows: slice) -> WireTensor:
    """Some rows of hidden states, as they are encoded; shares their memory."""
    count, width = tensor.shape
    start, end, _ = rows.indices(count)
    if (start, end) == (0, count):
        return tensor
    row_bytes = len(tensor.data) // count
    data = memoryview(tensor.data)[start * row_bytes : end * row_bytes]
    return WireTensor(tensor.dtype, (end - start, width), data, tensor.codec)


def join_rows(parts: Sequence[WireTensor]) -> WireTensor:
    """Hidden states of one dtype and codec, one after the other.

    Raises:
        RemoteProtocolError: they are of several.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any((part.dtype, part.codec) != (first.dtype, first.codec) for part in parts):
        raise RemoteProtocolError("hidden states came in several dtypes or codecs")
    rows = sum(part.shape[0] for part in parts)
    data = b"".join(part.data for part in parts)
    return WireTensor(first.dtype, (rows, first.shape[1]), data, first.codec)


def mask_from_wire(tensor: WireTensor, sequences: int, tokens: int) -> torch.Tensor:
    """An attention mask, bool ``[sequences, tokens]``, true for real tokens.

    Raises:
        RemoteProtocolError: it is none of that shape.
    """
    if (tensor.dtype, tensor.codec) != ("uint8", RAW) or tensor.shape != (sequences, tokens):
        raise RemoteProtocolError(
            f"a mask of {tensor.dtype} {list(tensor.shape)} came; "
            f"uint8 [{sequences}, {tokens}] was expected"
        )
    return torch.frombuffer(tensor.data, dtype=torch.uint8).view(sequences, tokens) != 0


def all_finite(values: torch.Tensor) -> bool:
    """Whether every number is finite; one pass, without a tensor of answers."""
    # A sum is finite just when every number is, but for sums beyond 1e38, which no model's hidden
    # states come near.
    return math.isfinite(values.sum(dtype=_SUM_DTYPES.get(values.dtype)))


async def off_loop(function: Callable[..., T], *args: Any, size_bytes: int) -> T:
    """Calls a function that goes over so many bytes: in a thread, where they are many.

    Cancellation: waits for the thread's end.
    """
    if size_bytes < LARGE_BYTES:
        return function(*args)
    return await trio.to_thread.run_sync(functools.partial(function, *args))


def _decode(tensor: WireTensor, hidden_size: int, max_tokens: int) -> torch.Tensor:
    codec = check_wire(tensor, hidden_size=hidden_size, max_tokens=max_tokens)
    data_SR = torch.frombuffer(tensor.data, dtype=torch.uint8).view(tensor.shape[0], -1)
    return codec.decode(data_SR, hidden_size, _wire_dtype(tensor.dtype))


def _check_finite(rows_SD: torch.Tensor) -> None:
    if not all_finite(rows_SD):
        raise RemoteProtocolError(f"hidden states came with numbers not finite in {rows_SD.dtype}")


def _wire_dtype(name: str) -> torch.dtype:
    dtype = WIRE_DTYPES.get(name)
    if dtype is None:
        raise RemoteProtocolError(f"hidden states came as {name}; a float was expected")
    return dtype
