"""Tensors as they cross the wire: a dtype, a shape, the name of a codec, and bytes.

This module carries tensors and checks what can be checked without doing arithmetic on them; what
the bytes mean is the business of ``petald.tensors`` and of the codecs in ``kernels``. Invariant: a
`WireTensor` that came out of `decode_tensor` has a known dtype, a bounded shape, and, for the codec
``raw``, exactly as many bytes as the two imply.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import msgpack

from p2p.errors import LocalProtocolError, RemoteProtocolError

TENSOR_EXTENSION = 1
"""The msgpack extension type of a tensor."""

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
}
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 32
RAW = "raw"
MAX_CODEC_NAME = 32


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor on its way.

    Attributes:
        dtype: of the decoded tensor, a key of `DTYPE_BYTES`.
        shape: of the decoded tensor.
        data: the encoded elements, row-major, little-endian for ``raw``.
        codec: how ``data`` encodes the elements.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview
    codec: str = RAW


def encode_tensor_header(tensor: WireTensor) -> bytes:
    """What stands in the extension before the tensor's data.

    Raises:
        LocalProtocolError: the tensor breaks this module's invariant.
    """
    problem = _find_problem(tensor.dtype, tensor.shape, tensor.codec, len(tensor.data))
    if problem:
        raise LocalProtocolError(f"cannot send a tensor with {problem}")
    return _format_header(tensor.dtype, tensor.shape, tensor.codec)


def decode_tensor(extension: bytes) -> WireTensor:
    """Reads an extension's content; ``data`` is a view of it, not a copy.

    Raises:
        RemoteProtocolError: it is not a tensor within the limits.
    """
    view = memoryview(extension)
    try:
        header_bytes = view[0]
        dtype, shape, codec = msgpack.unpackb(view[1 : 1 + header_bytes], use_list=False)
    except (IndexError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise RemoteProtocolError("a tensor's header cannot be read") from error
    data = view[1 + header_bytes :]
    problem = _find_problem(dtype, shape, codec, len(data))
    if problem:
        raise RemoteProtocolError(f"a tensor came with {problem}")
    return WireTensor(dtype, shape, data, codec)


@functools.lru_cache(maxsize=256)  # one session sends the same few shapes for ever
def _format_header(dtype: str, shape: tuple[int, ...], codec: str) -> bytes:
    header: bytes = msgpack.packb((dtype, shape, codec))
    return bytes((len(header),)) + header


def _find_problem(dtype: object, shape: object, codec: object, data_bytes: int) -> str | None:
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"an unknown dtype ({str(dtype)[:32]!r})"
    if not isinstance(codec, str) or len(codec) > MAX_CODEC_NAME:
        return "a codec that is not a short name"
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        return f"a shape that is not a list of at most {MAX_DIMENSIONS} sizes"
    if not all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in shape):
        return "a size that is negative, too large or not a whole number"
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS:
        return f"{elements} elements, more than {MAX_ELEMENTS}"
    if codec == RAW and data_bytes != elements * DTYPE_BYTES[dtype]:
        return (
            f"{data_bytes} bytes where {dtype}{list(shape)} takes {elements * DTYPE_BYTES[dtype]}"
        )
    return None
