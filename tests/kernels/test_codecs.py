"""Codecs: rows that can be cut and joined as bytes, and an error that is as small as claimed."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.codecs import CODEC_NAMES, GROUP_VALUES, find_codec
from kernels.errors import UnknownCodec

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 63, 64, 65, 576])
def test_rows_are_encoded_each_by_itself(name: str, dtype: torch.dtype, width: int) -> None:
    codec = find_codec(name)
    hidden_SD = torch.randn(7, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = codec.encode(hidden_SD)
    assert whole.shape == (7, codec.row_bytes(width, dtype))
    assert whole.dtype == torch.uint8
    parts = torch.cat([codec.encode(hidden_SD[:3]), codec.encode(hidden_SD[3:])])
    assert torch.equal(whole, parts)
    decoded = codec.decode(whole, width, dtype)
    assert (decoded.dtype, decoded.shape) == (dtype, hidden_SD.shape)
    # A history replays to the same bits, however its rows are grouped.
    assert torch.equal(decoded[2:5], codec.decode(whole[2:5], width, dtype))


def test_raw_is_exact() -> None:
    codec = find_codec("raw")
    hidden_SD = torch.randn(3, 5)
    assert torch.equal(codec.decode(codec.encode(hidden_SD), 5, torch.float32), hidden_SD)


def test_int8_errs_by_half_a_step_of_the_groups_largest_value() -> None:
    codec = find_codec("int8")
    hidden_SD = torch.randn(40, 200) * torch.logspace(-6, 4, 40)[:, None]
    decoded = codec.decode(codec.encode(hidden_SD), 200, torch.float32)
    for start in range(0, 200, GROUP_VALUES):
        group = slice(start, start + GROUP_VALUES)
        largest = hidden_SD[:, group].abs().amax(dim=1)
        error = (decoded - hidden_SD)[:, group].abs().amax(dim=1)
        # Half a step, and what the scale loses in float16 (2**-11, more where it is subnormal).
        assert (error <= largest / 127 * 0.5 + largest * 2**-11 + 127 * 2**-25).all()


def test_int8_takes_about_half_of_bfloat16() -> None:
    codec = find_codec("int8")
    assert codec.row_bytes(4096, torch.bfloat16) / (2 * 4096) == pytest.approx(0.516, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30])
def test_int8_takes_zeros_and_what_is_nearly_so(value: float) -> None:
    codec = find_codec("int8")
    hidden_SD = torch.full((1, 64), value)
    assert torch.equal(codec.decode(codec.encode(hidden_SD), 64, torch.float32), torch.zeros(1, 64))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9])
def test_int8_does_not_hide_what_it_cannot_write(value: float) -> None:
    codec = find_codec("int8")
    hidden_SD = torch.zeros(1, 64)
    hidden_SD[0, 3] = value
    decoded = codec.decode(codec.encode(hidden_SD), 64, torch.float32)
    assert not torch.isfinite(decoded).all()


def test_an_unknown_codec_is_said() -> None:
    with pytest.raises(UnknownCodec, match="zip"):
        find_codec("zip")
