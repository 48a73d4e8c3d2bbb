"""Codecs on a GPU: to the bytes, and to the bits, of what a processor makes of the same.

Shapes: S rows, D hidden size, R bytes of an encoded row.
"""

from __future__ import annotations

import threading

import pytest
import torch

from kernels.codecs import int8
from kernels.codecs.registry import CODEC_NAMES, find_codec
from kernels.errors import NotFinite
from tests.helpers.gpu import GPU, needs_gpu
from tests.helpers.triton_interpreted import make_rows

pytestmark = needs_gpu

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOSSY = [name for name in CODEC_NAMES if find_codec(name).is_lossy]
SHAPES = [(0, 64), (1, 1), (3, 63), (2, 64), (4, 65), (3, 576), (2, 1100), (1, 4096), (700, 577)]


def same_bits(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Two that are not numbers may differ in their bits; no two numbers may."""
    assert ours.dtype == expected.dtype
    is_same = (ours.cpu() == expected) | (ours.cpu().isnan() & expected.isnan())
    return bool(is_same.all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_of_every_codec(name: str, dtype: torch.dtype) -> None:
    codec = find_codec(name)
    for count, width in SHAPES:
        rows_SD = make_rows(count, width, dtype) / 64  # within what every codec can write
        data_SR = codec.encode(rows_SD)
        of_gpu_SR = codec.encode(rows_SD.to(GPU))
        assert of_gpu_SR.device.type == "cpu"
        assert torch.equal(of_gpu_SR, data_SR), (count, width)
        made_up_SR = torch.randint(0, 256, data_SR.shape, dtype=torch.uint8)
        for bytes_SR in (data_SR, made_up_SR):
            expected_SD = codec.decode(bytes_SR, width, dtype)
            decoded_SD = codec.decode(bytes_SR.to(GPU), width, dtype)
            assert decoded_SD.device.type == GPU.type
            if not name.startswith("hadamard"):
                assert same_bits(decoded_SD, expected_SD), (count, width)
            elif bytes_SR is data_SR:  # its sums are in another order there
                most = float(expected_SD.abs().max()) if count else 0.0
                tolerance = most * 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(decoded_SD.cpu(), expected_SD, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_strides_make_no_difference(name: str) -> None:
    codec = find_codec(name)
    wide_SD = make_rows(130, 200, torch.bfloat16) / 64
    for index in ((slice(None, None, 2), slice(None, None, 3)), (slice(5), slice(7, 190))):
        rows_SD = wide_SD[index]
        data_SR = codec.encode(rows_SD)
        assert torch.equal(codec.encode(wide_SD.to(GPU)[index]), data_SR)
        assert torch.equal(codec.encode(wide_SD.to(GPU).t()), codec.encode(wide_SD.t()))
        odd_SR = torch.zeros(data_SR.shape[0], data_SR.shape[1] + 1, dtype=torch.uint8)[:, 1:]
        odd_SR.copy_(data_SR)
        expected_SD = codec.decode(data_SR, rows_SD.shape[1], torch.bfloat16)
        decoded_SD = codec.decode(odd_SR.to(GPU), rows_SD.shape[1], torch.bfloat16)
        assert same_bits(decoded_SD, expected_SD)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    for dtype in FLOATS:
        rows_SD = torch.ones(70, 300, dtype=dtype, device=GPU)
        rows_SD[69, 299] = value
        with pytest.raises(NotFinite):
            find_codec(name).encode(rows_SD)


def test_int8_is_written_and_read_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = find_codec("int8")
    fused = int8.find_fused(GPU, torch.bfloat16)
    assert fused is not None, "CUDA builds of PyTorch bring Triton"
    taken = []
    for name in ("encode_int8", "decode_int8"):
        function = getattr(fused, name)

        def counted(*args: object, name: str = name, function: object = function) -> object:
            taken.append(name)
            return function(*args)  # type: ignore[operator]

        monkeypatch.setattr(fused, name, counted)
    for dtype in FLOATS:
        data_SR = codec.encode(torch.ones(2, 100, dtype=dtype, device=GPU))
        codec.decode(data_SR.to(GPU), 100, dtype)
    assert taken == ["encode_int8", "decode_int8"] * 3  # of float64, the plain operations


def test_many_rows_by_several_threads() -> None:
    failed: list[str] = []

    def check(number: int) -> None:
        for name in CODEC_NAMES:
            codec = find_codec(name)
            rows_SD = make_rows(300 + number, 1000 + number, torch.bfloat16) / 64
            if not torch.equal(codec.encode(rows_SD.to(GPU)), codec.encode(rows_SD)):
                failed.append(f"{name} of {number}")

    threads = [threading.Thread(target=check, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
