"""Attacks the decoding of hidden states.

Invariant: whatever the bytes are, a codec decodes as many as `row_bytes` says to rows of the right
shape and dtype, and raises nothing; a row decodes to the same bits alone as among others; and what
is decoded, where it is finite, can be encoded, or is refused with `NotFinite`.

Input: a byte each for codec, dtype, hidden size and rows; then the encoded rows, repeated or cut to
the length that they must have.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

import torch

from fuzz.campaign import main
from kernels.codecs.registry import CODEC_NAMES, find_codec
from kernels.errors import NotFinite

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADER_BYTES = 4


def check(data: bytes) -> None:
    if len(data) <= HEADER_BYTES:
        return
    codec = find_codec(CODEC_NAMES[data[0] % len(CODEC_NAMES)])
    dtype = DTYPES[data[1] % len(DTYPES)]
    hidden_size = 1 + data[2]
    rows = 1 + data[3] % 4
    size = rows * codec.row_bytes(hidden_size, dtype)
    encoded = bytearray(data[HEADER_BYTES:] * (size // (len(data) - HEADER_BYTES) + 1))[:size]
    data_SR = torch.frombuffer(encoded, dtype=torch.uint8).view(rows, -1)
    decoded_SD = codec.decode(data_SR, hidden_size, dtype)
    assert decoded_SD.dtype == dtype
    assert decoded_SD.shape == (rows, hidden_size)
    bits_SD = decoded_SD.view(torch.uint8)
    for row in range(rows):
        alone_D = codec.decode(data_SR[row : row + 1], hidden_size, dtype)[0]
        is_same = torch.equal(alone_D.view(torch.uint8), bits_SD[row])
        assert is_same or not decoded_SD[row].isfinite().all()
    if decoded_SD.isfinite().all():
        try:
            again_SR = codec.encode(decoded_SD)
        except NotFinite:
            return
        assert again_SR.shape == data_SR.shape


if __name__ == "__main__":
    main(check, "fuzz_codec")
