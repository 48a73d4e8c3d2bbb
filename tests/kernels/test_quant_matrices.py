"""Matrices in few bits: each way of multiplying against the plain product, and what is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.quant import matrix as tiles
from kernels.quant.formats import FORMATS, quantise_parts
from kernels.quant.matrix import dequantise, multiply_back

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((256, 128), (80, 192), (1, 64), (200, 576))
# Half of the distance of neighbouring codes, over the root mean square of normal weights.
WEIGHT_ERROR = {"int8": 0.012, "nf4": 0.11, "int4": 0.1}


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(quant: str, weight: torch.Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """Stored weights, and the matrix that computes."""
    stored = quantise_parts(quant, [weight], dtype)
    return stored, stored.place(dtype)


def assert_near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Each number within two roundings of its dtype of the largest.

    In more than 16 bits within some more, for there the sums are rounded as often as they grow.
    """
    roundings = 2 if ours.itemsize == 2 else 32
    step = torch.finfo(ours.dtype).eps
    assert (ours.double() - exact).abs().max() <= roundings * step * exact.abs().max()


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_rows_gives_the_plain_product(
    quant: str, dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 70 * shape[1])  # so that there are several
    _, matrix = make(quant, random(*shape), dtype)
    plain = dequantise(matrix, torch.float64)
    assert plain.shape == matrix.shape == shape
    for rows in (1, 2, 12, 13, 64, 300):
        x = random(rows, shape[1], seed=2).to(dtype)
        output = matrix.multiply(x)
        assert output.dtype == dtype
        assert_near(output, x.double() @ plain.t())
    gradient = random(40, shape[0], seed=3).to(dtype)
    assert_near(multiply_back(matrix, gradient), gradient.double() @ plain)


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_weights_are_as_exact_as_others(quant: str, dtype: torch.dtype) -> None:
    weight = 1e-7 * random(48, 128)
    _, matrix = make(quant, weight, dtype)
    away = dequantise(matrix, torch.float64) - weight
    assert away.square().mean().sqrt() < WEIGHT_ERROR[quant] * 1e-7


@pytest.mark.parametrize("quant", FORMATS)
def test_matrices_side_by_side_are_those_alone(quant: str) -> None:
    form = FORMATS[quant]
    weights = [random(rows, 128, seed=rows) for rows in (32, 16, 96)]
    joined = quantise_parts(quant, weights, torch.float32)
    alone = [form.quantise(weight, torch.float32) for weight in weights]
    expected = torch.cat([part.dequantise(torch.float32) for part in alone])
    ours = dequantise(joined.place(torch.float32), torch.float32)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-2)  # what nesting of scales costs
    assert (ours - torch.cat(weights)).norm() < WEIGHT_ERROR[quant] * ours.norm()


@pytest.mark.parametrize("quant", FORMATS)
def test_the_placed_matrix_is_the_stored_one(quant: str) -> None:
    for dtype in DTYPES:
        stored, matrix = make(quant, random(96, 128), dtype)
        plain = stored.dequantise(torch.float64)
        assert_near(dequantise(matrix, dtype), plain)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_at_the_ends_of_their_range(quant: str, dtype: torch.dtype) -> None:
    weight = random(64, 64).to(dtype)
    weight[0] = 0.0
    weight[1, 5] = 8.0
    weight[2] *= 1e-4
    weight[3] = 3.0
    weight[4] = -3.0
    _, matrix = make(quant, weight, torch.float32)
    plain = dequantise(matrix, torch.float32)
    assert torch.isfinite(plain).all()
    assert not plain[0].any()
    close = {"rtol": 0.03, "atol": 0.0}
    torch.testing.assert_close(plain[3:5], weight[3:5].float(), **close)
    torch.testing.assert_close(plain[1, 5], weight[1, 5].float(), **close)


@pytest.mark.parametrize("quant", FORMATS)
def test_no_more_than_a_tile_is_written_out(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64 * 128)
    _, matrix = make(quant, random(512, 128), torch.bfloat16)
    read = matrix.read_rows
    largest = 0

    def note(start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        nonlocal largest
        tile: torch.Tensor = read(start, end, dtype)
        largest = max(largest, tile.numel())
        return tile

    monkeypatch.setattr(matrix, "read_rows", note)
    matrix.multiply(random(500, 128).bfloat16())
    multiply_back(matrix, random(500, 512).bfloat16())
    assert 0 < largest <= 64 * 128
