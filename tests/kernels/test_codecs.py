"""What holds for every codec: rows that can be cut and joined as bytes, errors as small as claimed.

Shapes: S rows, D hidden size.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.codecs.codec import Codec
from kernels.codecs.names import CODECS
from kernels.codecs.registry import CODEC_NAMES, find_codec
from kernels.errors import NotFinite, UnknownCodec

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOSSY = [name for name in CODEC_NAMES if find_codec(name).is_lossy]
BY_GROUPS = ["int8", "dynamic8"]
ROTATED = ["hadamard4", "hadamard5"]

every_codec = pytest.mark.parametrize("name", CODEC_NAMES)
every_lossy = pytest.mark.parametrize("name", LOSSY)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def make_rows(count: int, width: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Rows as a model has them: a few channels and rows are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    rows_SD = torch.randn(count, width, generator=generator)
    rows_SD[:, width // 3] *= 30
    rows_SD[count // 2 :] *= 8
    return rows_SD.to(dtype)


def there_and_back(codec: Codec, rows_SD: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(rows_SD), rows_SD.shape[1], rows_SD.dtype)


@every_codec
@every_dtype
@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 257, 576])
def test_rows_are_encoded_each_by_itself(name: str, dtype: torch.dtype, width: int) -> None:
    codec = find_codec(name)
    hidden_SD = make_rows(7, width, dtype)
    whole = codec.encode(hidden_SD)
    assert whole.shape == (7, codec.row_bytes(width, dtype))
    assert whole.dtype == torch.uint8
    assert whole.is_contiguous()
    rows = torch.cat([codec.encode(hidden_SD[row : row + 1]) for row in range(7)])
    assert torch.equal(whole, rows)
    decoded = codec.decode(whole, width, dtype)
    assert (decoded.dtype, decoded.shape) == (dtype, hidden_SD.shape)
    # A history replays to the same bits, however its rows are grouped.
    assert torch.equal(decoded[2:5], codec.decode(whole[2:5], width, dtype))


@every_codec
def test_many_rows_are_encoded_as_few_are(name: str) -> None:
    codec = find_codec(name)
    hidden_SD = make_rows(1500, 576, torch.float32)  # goes in several chunks
    whole = codec.encode(hidden_SD)
    assert torch.equal(whole[700:703], codec.encode(hidden_SD[700:703]))
    decoded = codec.decode(whole, 576, torch.float32)
    assert torch.equal(decoded[700:703], codec.decode(whole[700:703], 576, torch.float32))


@every_codec
@every_dtype
def test_no_rows_are_no_bytes(name: str, dtype: torch.dtype) -> None:
    codec = find_codec(name)
    data = codec.encode(torch.empty(0, 65, dtype=dtype))
    assert data.shape == (0, codec.row_bytes(65, dtype))
    assert codec.decode(data, 65, dtype).shape == (0, 65)


@every_codec
@every_dtype
def test_strides_make_no_difference(name: str, dtype: torch.dtype) -> None:
    codec = find_codec(name)
    wide = make_rows(6, 200, dtype)
    for rows_SD in (wide[::2, ::3], wide.t(), wide[:, 5:105], wide[:1].expand(4, 200)):
        plain = rows_SD.clone(memory_format=torch.contiguous_format)
        assert torch.equal(codec.encode(rows_SD), codec.encode(plain))


@every_codec
def test_bytes_that_lie_anywhere_are_read(name: str) -> None:
    codec = find_codec(name)
    data = codec.encode(make_rows(3, 65, torch.float32))
    expected = codec.decode(data, 65, torch.float32)
    room = torch.zeros(data.numel() + 1, dtype=torch.uint8)
    room[1:] = data.view(-1)
    odd = room[1:].view(data.shape)
    assert torch.equal(codec.decode(odd, 65, torch.float32), expected)


@every_codec
def test_encoding_changes_no_input_and_no_gradient(name: str) -> None:
    codec = find_codec(name)
    hidden_SD = make_rows(3, 64, torch.float32).requires_grad_()
    before = hidden_SD.detach().clone()
    assert not codec.encode(hidden_SD).requires_grad
    assert torch.equal(hidden_SD.detach(), before)


@every_codec
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.5, 1024.0])
def test_a_constant_stays_one(name: str, value: float) -> None:
    hidden_SD = torch.full((2, 100), value)
    decoded = there_and_back(find_codec(name), hidden_SD)
    assert (decoded == decoded[0, 0]).all()
    # The map of dynamic8 has 1, and not -1: 0.993 is next.
    coarse = name == "dynamic8" and value < 0
    torch.testing.assert_close(decoded, hidden_SD, rtol=2**-7 if coarse else 2**-22, atol=0)


@every_lossy
@pytest.mark.parametrize("value", [1e-45, 1e-40, -1e-40, 2e-38])
def test_what_is_next_to_nothing_stays_so(name: str, value: float) -> None:
    decoded = there_and_back(find_codec(name), torch.full((1, 64), value))
    assert decoded.abs().max() <= 2.5e-38


@pytest.mark.parametrize("name", ["bfloat16", *BY_GROUPS])
@pytest.mark.parametrize("value", [1e-9, 1e9, 1e30, 3.3e38])
def test_small_and_large_values_are_written(name: str, value: float) -> None:
    hidden_SD = torch.tensor([[value, value] * 50])
    torch.testing.assert_close(
        there_and_back(find_codec(name), hidden_SD), hidden_SD, rtol=5e-3, atol=0
    )


@every_lossy
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [1, 100, 600])
def test_what_is_not_finite_is_refused(
    name: str, dtype: torch.dtype, value: float, width: int
) -> None:
    hidden_SD = torch.zeros(3, width, dtype=dtype)
    hidden_SD[1, width // 2] = value
    with pytest.raises(NotFinite, match=f"{dtype} .*{name}") as caught:
        find_codec(name).encode(hidden_SD)
    assert caught.value.code == "not_finite"


@every_lossy
def test_what_is_beyond_the_codec_is_refused(name: str) -> None:
    value = 1e6 if name == "float16" else 1e300
    with pytest.raises(NotFinite):
        find_codec(name).encode(torch.full((2, 3), value, dtype=torch.float64))


@pytest.mark.parametrize("name", ["bfloat16", *BY_GROUPS])
def test_the_largest_of_float16_decode_to_finite_numbers(name: str) -> None:
    codec = find_codec(name)
    for value in torch.linspace(65000, 65504, 64).tolist():
        hidden_SD = torch.full((1, 8), value, dtype=torch.float16)
        try:
            data = codec.encode(hidden_SD)
        except NotFinite:
            continue
        assert codec.decode(data, 8, torch.float16).isfinite().all()


@every_codec
@every_dtype
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_bytes_decode_to_numbers(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    codec = find_codec(name)
    width = data.draw(st.integers(1, 300))
    count = data.draw(st.integers(1, 3))
    total = count * codec.row_bytes(width, dtype)
    seed = data.draw(st.binary(min_size=1, max_size=64))
    raw = bytearray((seed * (total // len(seed) + 1))[:total])
    decoded = codec.decode(torch.frombuffer(raw, dtype=torch.uint8).view(count, -1), width, dtype)
    assert (decoded.dtype, decoded.shape) == (dtype, (count, width))


@every_codec
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFE, 0xFF])
@pytest.mark.parametrize("count", [1, 200])
def test_the_largest_and_no_numbers_decode_without_a_warning(
    name: str, byte: int, count: int
) -> None:
    codec = find_codec(name)
    row_bytes = codec.row_bytes(65, torch.float32)
    data = torch.full((count, row_bytes), byte, dtype=torch.uint8)
    data[:, ::4] = 0x80  # with 0x7F: infinity in bfloat16
    assert codec.decode(data, 65, torch.float32).shape == (count, 65)


RELATIVE = {"raw": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.mark.parametrize("name", sorted(RELATIVE))
@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(2.0**-14, 60000, width=32), min_size=1, max_size=40),
    sign=st.sampled_from([-1, 1]),
)
def test_floats_err_by_half_of_their_last_bit(name: str, values: list[float], sign: int) -> None:
    hidden_SD = sign * torch.tensor([values])
    decoded = there_and_back(find_codec(name), hidden_SD)
    assert ((decoded - hidden_SD).abs() <= RELATIVE[name] * hidden_SD.abs()).all()


def test_an_unknown_codec_is_said() -> None:
    with pytest.raises(UnknownCodec, match="zip"):
        find_codec("zip")


def test_every_codec_that_can_be_configured_is_there() -> None:
    assert tuple(CODECS) == CODEC_NAMES
