"""The parts of a block that have gradients of their own, against what torch makes of plain ones."""

from __future__ import annotations

import pytest
import torch

from kernels.adapter import LowRankPair, add_pairs
from kernels.mlp import gate
from kernels.norm import RMSNorm
from kernels.rotary import RotaryTable, rotate
from kernels.rotary_config import RotaryConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_constant", [(), ("x",), ("base", "x"), ("pairs",)], ids=str)
def test_pairs_added_in_place_equal_plain_products(is_constant: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(9)

    def leaf(name: str, *shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, dtype=torch.float64, generator=generator)
        return tensor.requires_grad_(name not in is_constant)

    base, x = leaf("base", 5, 9), leaf("x", 5, 4)
    columns = (slice(0, 3), slice(3, 9), slice(3, 9))
    pairs = [
        LowRankPair(leaf("pairs", rank, 4), leaf("pairs", c.stop - c.start, rank), scaling)
        for c, rank, scaling in zip(columns, (2, 1, 3), (0.5, 2.0, -1.0), strict=True)
    ]
    leaves = [base, x, *(matrix for pair in pairs for matrix in (pair.down_RI, pair.up_OR))]
    wanted = [tensor for tensor in leaves if tensor.requires_grad]
    plain = base.clone()
    for c, pair in zip(columns, pairs, strict=True):
        product = pair.scaling * (x @ pair.down_RI.t() @ pair.up_OR.t())
        plain = plain + torch.nn.functional.pad(product, (c.start, 9 - c.stop))
    ours = add_pairs(base * 1, x, list(zip(columns, pairs, strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(
            add_pairs(base * 1, x, list(zip(columns, pairs, strict=True))), plain
        )
    torch.testing.assert_close(ours, plain)
    gradient = torch.randn(5, 9, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(ours, wanted, gradient), torch.autograd.grad(plain, wanted, gradient)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_with_their_own_gradients_equal_plain_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    norm = RMSNorm(torch.randn(8, generator=generator).to(dtype), 1e-5)
    table = RotaryTable(RotaryConfig(), 4, dtype=dtype, device=CPU)

    def plain_gate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(first) * second

    def plain_norm(x: torch.Tensor) -> torch.Tensor:
        return norm.normalise(x)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return rotate(x.view(5, 2, 4), *table.at(3, 5))

    def plain_turned(x: torch.Tensor) -> torch.Tensor:
        cos, sin = table.at(3, 5)
        heads = x.view(5, 2, 4)
        return heads * cos + heads.roll(2, -1) * sin

    for ours, plain in ((gate, plain_gate), (norm.apply, plain_norm), (turned, plain_turned)):
        x = torch.randn(5, 8, generator=generator).to(dtype).requires_grad_()
        expected = plain(x)
        gradient = torch.randn(expected.shape, generator=generator).to(dtype)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(ours(x), expected, **tolerance)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected, **tolerance)
        (of_ours,) = torch.autograd.grad(ours(x), x, gradient)
        (of_plain,) = torch.autograd.grad(expected, x, gradient)
        torch.testing.assert_close(of_ours, of_plain, **tolerance)
