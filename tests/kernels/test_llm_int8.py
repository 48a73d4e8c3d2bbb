"""LLM.int8(): what its decomposition is for, and bitsandbytes' own against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.quant.int8 import Int8Weights, quantise_int8
from kernels.quant.int8_gpu import Int8GpuMatrix
from kernels.quant.llm_int8 import OUTLIER_THRESHOLD, multiply_int8, multiply_llm_int8
from kernels.quant.matrix import dequantise

ROWS, WIDTH_IN, WIDTH_OUT = 24, 1024, 512


def make_activations(outlier_features: int, size: float = 60.0) -> torch.Tensor:
    """Rows of which some features are much larger than all others, in every row (section 4)."""
    generator = torch.Generator().manual_seed(5)
    x_SI = torch.randn(ROWS, WIDTH_IN, generator=generator).clamp_(-4, 4)
    columns = torch.randperm(WIDTH_IN, generator=generator)[:outlier_features]
    x_SI[:, columns] = size * (1 + 0.1 * torch.randn(ROWS, outlier_features, generator=generator))
    return x_SI.half()


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return (torch.randn(WIDTH_OUT, WIDTH_IN, generator=generator) * 0.02).bfloat16()


@pytest.fixture(scope="module")
def weights(weight: torch.Tensor) -> Int8Weights:
    return quantise_int8(weight)


def errors(x_SI: torch.Tensor, weights: Int8Weights) -> dict[str, float]:
    """Of each way, over the size of what the ordinary features contribute to the exact product.

    The outliers' own contribution is thousands of times larger, and would hide every difference.
    Exact is the product with the dequantised weights: their rounding costs all the same.
    """
    plain_OI = weights.dequantise(torch.float64)
    exact = x_SI.double() @ plain_OI.t()
    is_ordinary = x_SI.abs().amax(dim=0) < OUTLIER_THRESHOLD
    ordinary = x_SI[:, is_ordinary].double() @ plain_OI[:, is_ordinary].t()
    products = {
        "16 bits": torch.mm(x_SI, weights.dequantise(x_SI.dtype).t()),
        "plain int8": multiply_int8(x_SI, weights),
        "LLM.int8()": multiply_llm_int8(x_SI, weights),
    }
    return {
        name: float((product.double() - exact).norm() / ordinary.norm())
        for name, product in products.items()
    }


def test_without_outliers_both_are_near(weights: Int8Weights) -> None:
    of = errors(make_activations(0), weights)
    assert of["16 bits"] < 0.002
    assert of["LLM.int8()"] == of["plain int8"] < 0.01


@pytest.mark.parametrize("outlier_features", [1, 6])
def test_planted_outliers_break_plain_int8_alone(
    weights: Int8Weights, outlier_features: int
) -> None:
    of = errors(make_activations(outlier_features), weights)
    # Of 127 codes, a dozen are left for what is no outlier; LLM.int8() is as good as without any.
    assert of["16 bits"] < 0.002
    assert of["LLM.int8()"] < 0.01
    assert of["plain int8"] > 10 * of["LLM.int8()"]


def test_a_features_outlier_in_one_row_takes_it_out_of_all(weights: Int8Weights) -> None:
    x_SI = make_activations(0)
    x_SI[3, 7] = 50.0
    ours = multiply_llm_int8(x_SI, weights)
    rest = x_SI.clone()
    rest[:, 7] = 0.0
    column = x_SI[:, 7:8] @ weights.dequantise(x_SI.dtype)[:, 7:8].t()
    torch.testing.assert_close(ours, multiply_int8(rest, weights) + column)


DEVICES = [
    "cpu",  # where bitsandbytes has the same, in plain torch
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outlier_features", [0, 1, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_bitsandbytes_equals_the_reference(
    weight: torch.Tensor, device: str, outlier_features: int, dtype: torch.dtype
) -> None:
    x_SI = make_activations(outlier_features).to(device, dtype)
    stored = quantise_int8(weight.to(device))
    matrix = Int8GpuMatrix(stored.codes_OI, stored.scales_O, dtype)
    plain_OI = stored.dequantise(torch.float64)
    torch.testing.assert_close(dequantise(matrix, torch.float64), plain_OI)
    ordinary = torch.where(x_SI.abs() < OUTLIER_THRESHOLD, x_SI, 0).double() @ plain_OI.t()
    for rows in (1, ROWS):
        ours = matrix.multiply(x_SI[:rows])
        assert ours.dtype == dtype
        expected = multiply_llm_int8(x_SI[:rows].half(), stored).double()
        if dtype == torch.float32:  # in which activations stay as they are
            expected = x_SI[:rows].double() @ plain_OI.t()
        # Rounded to 16 bits, of which the outliers' contribution takes the most.
        roundings = 2 * torch.finfo(dtype).eps * expected.norm()
        assert (ours - expected).norm() < 0.01 * ordinary[:rows].norm() + roundings


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_given_llm_int8(weight: torch.Tensor) -> None:
    assert isinstance(quantise_int8(weight.cuda()).place(torch.bfloat16), Int8GpuMatrix)
