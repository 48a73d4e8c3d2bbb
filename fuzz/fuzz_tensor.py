"""Attacks the reading of tensors.

Invariant: `decode_tensor` raises nothing but `RemoteProtocolError`; a tensor that it gives has a
known dtype, a bounded shape, for the codec ``raw`` exactly the bytes of it, and can be encoded to
the same again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

import math

from fuzz.campaign import main
from p2p.errors import RemoteProtocolError
from p2p.wire.tensor import (
    DTYPE_BYTES,
    MAX_DIMENSIONS,
    MAX_ELEMENTS,
    RAW,
    decode_tensor,
    encode_tensor_header,
)


def check(data: bytes) -> None:
    try:
        tensor = decode_tensor(data)
    except RemoteProtocolError:
        return
    assert len(tensor.shape) <= MAX_DIMENSIONS
    assert all(type(size) is int and size >= 0 for size in tensor.shape)
    elements = math.prod(tensor.shape)
    assert elements <= MAX_ELEMENTS
    if tensor.codec == RAW:
        assert len(tensor.data) == elements * DTYPE_BYTES[tensor.dtype]
    assert decode_tensor(encode_tensor_header(tensor) + bytes(tensor.data)) == tensor


if __name__ == "__main__":
    main(check, "fuzz_tensor")
