"""Four-bit weights in torch's own order, whichever instructions it finds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kernels.quant import int4
from kernels.quant.formats import why_slow
from kernels.quant.int4 import Int4Matrix, quantise_int4
from kernels.quant.int4_order import _KNOWN_ORDERS, OUR_ORDER, CodeOrder, find_order
from kernels.quant.matrix import dequantise

CPU = torch.device("cpu")


@pytest.mark.parametrize("order", [*_KNOWN_ORDERS, OUR_ORDER], ids=str)
def test_every_order_can_be_undone(order: CodeOrder) -> None:
    codes = torch.randint(0, 256, (128, 48), dtype=torch.uint8)
    numbers = order.unpack(order.pack(codes), torch.float32)
    assert torch.equal(numbers[:, ::2], (codes >> 4).float())
    assert torch.equal(numbers[:, 1::2], (codes & 0xF).float())


PROGRAM = """
import torch
from kernels.quant.int4 import quantise_int4
from kernels.quant.int4_order import find_order
assert torch.backends.cpu.get_cpu_capability() == {capability!r}
order = find_order()
assert order.is_torchs, order
weights = quantise_int4(torch.randn(192, 128))
x = torch.randn(3, 128)
expected = x @ weights.dequantise(torch.float32).t()
torch.testing.assert_close(weights.place(torch.float32).multiply(x), expected)
print(order.block, order.is_split)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_orders_of_other_cpus(capability: str) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs a CPU that can do less than it does")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(capability=capability.upper())],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_order_goes_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = quantise_int4(torch.randn(96, 64), torch.bfloat16)
    usual = weights.place(torch.bfloat16)
    monkeypatch.setattr(int4, "find_order", lambda: OUR_ORDER)
    matrix = Int4Matrix(weights, torch.bfloat16)
    assert torch.equal(dequantise(matrix, torch.float32), dequantise(usual, torch.float32))
    x = torch.randn(2, 64).bfloat16()
    expected = x @ weights.dequantise(torch.bfloat16).t()
    torch.testing.assert_close(matrix.multiply(x), expected)


def test_what_is_slow_is_told() -> None:
    assert why_slow("int4", torch.bfloat16, CPU) == ""
    assert find_order().is_torchs
    assert "choose nf4" in why_slow("int4", torch.bfloat16, torch.device("cuda"))
    assert "bfloat16" in why_slow("int8", torch.float32, CPU)
    assert why_slow("none", torch.float32, CPU) == ""
