"""Compares the Triton kernels with the codec's plain operations, in Triton's interpreter.

Run as a module, with ``TRITON_INTERPRET=1``: whether kernels are interpreted is settled when they
are defined, so it takes a process of its own. Prints how many kernels were started.

Shapes: S rows, D hidden size.
"""

from __future__ import annotations

from types import ModuleType

import torch

from kernels.codecs import int8
from kernels.codecs.registry import find_codec
from kernels.errors import NotFinite
from kernels.triton import int8 as fused

CODEC = find_codec("int8")
SHAPES = [(0, 64), (1, 1), (3, 63), (2, 64), (4, 65), (3, 576), (2, 1100)]


def make_rows(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Of many sizes; some are zero, next to nothing, on the border of two codes, or the largest."""
    generator = torch.Generator().manual_seed(width)
    rows_SD = torch.randn(count, width, generator=generator)
    rows_SD *= 10 ** (2 * torch.randn(count, width, generator=generator))
    if count > 1:
        rows_SD[1] = torch.arange(width) / 2 - 60
    if count > 2:
        rows_SD[2] = 0
        rows_SD[2, ::7] = 1e-40
        rows_SD[2, width // 2 :] = 60_000
    return rows_SD.clamp(-60_000, 60_000).to(dtype)


def check(rows_SD: torch.Tensor) -> None:
    width, dtype = rows_SD.shape[1], rows_SD.dtype
    with_fused(None)
    data_SR = CODEC.encode(rows_SD)
    made_up_SR = torch.randint(0, 256, data_SR.shape, dtype=torch.uint8)
    plain = [CODEC.decode(bytes_SR, width, dtype) for bytes_SR in (data_SR, made_up_SR)]
    with_fused(fused)
    assert torch.equal(CODEC.encode(rows_SD), data_SR), rows_SD.shape
    odd_SR = torch.zeros(data_SR.shape[0], data_SR.shape[1] + 1, dtype=torch.uint8)[:, 1:]
    for bytes_SR, expected_SD in zip((data_SR, made_up_SR), plain, strict=True):
        odd_SR.copy_(bytes_SR)
        for given_SR in (bytes_SR, odd_SR):
            decoded_SD = CODEC.decode(given_SR, width, dtype)
            # Two that are not numbers may differ in their bits; no two numbers may.
            same = (decoded_SD == expected_SD) | (decoded_SD.isnan() & expected_SD.isnan())
            assert same.all(), rows_SD.shape


def check_refusals(dtype: torch.dtype) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        rows_SD = make_rows(3, 100, dtype)
        rows_SD[2, 99] = value
        try:
            CODEC.encode(rows_SD)
        except NotFinite:
            continue
        raise AssertionError(f"{value} was encoded")


def with_fused(module: ModuleType | None) -> None:
    int8.find_fused = lambda device, dtype: module  # type: ignore[assignment]


def count_starts() -> list[int]:
    starts = [0]
    for name in ("encode_int8", "decode_int8"):
        function = getattr(fused, name)

        def counted(*args: object, function: object = function) -> object:
            starts[0] += 1
            return function(*args)  # type: ignore[operator]

        setattr(fused, name, counted)
    return starts


def main() -> None:
    starts = count_starts()
    for dtype in fused.DTYPES:
        for count, width in SHAPES:
            check(make_rows(count, width, dtype))
        check(make_rows(130, 4, dtype).t())
        check(make_rows(6, 200, dtype)[::2, ::3])
        check_refusals(dtype)
    print(starts[0])


if __name__ == "__main__":
    main()
