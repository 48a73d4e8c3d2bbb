"""4-bit NormalFloat bit for bit as bitsandbytes has it, with and without its products."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels.errors import UnknownWeightFormat
from kernels.quant import bnb, nf4_matrix
from kernels.quant.bnb import import_bitsandbytes
from kernels.quant.formats import quantise_parts, why_slow
from kernels.quant.matrix import dequantise
from kernels.quant.nf4 import (
    LEVELS,
    NestedScales,
    Nf4Weights,
    make_dynamic_levels,
    nest_scales,
    quantise_nf4,
)
from kernels.quant.nf4_matrix import (
    Nf4GpuMatrix,
    Nf4Matrix,
    Nf4PackedMatrix,
    has_cpu_kernel,
    place_nf4,
)

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (5, 64), (300, 320)], ids=str)
def test_codes_and_scales_are_bitsandbytes_own(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    functional = import_bitsandbytes().functional
    weight = random(*shape).to(dtype)
    weight[0] = 0.0
    theirs, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    ours = nest_scales(quantise_nf4(weight))
    assert isinstance(ours.scales, NestedScales)
    assert torch.equal(ours.codes_OI.flatten(), theirs.flatten())
    assert torch.equal(ours.scales.offset, state.offset)
    assert torch.equal(ours.scales.largest, state.state2.absmax)
    assert torch.equal(ours.scales.levels, state.state2.code)
    # A scale near the middle of two levels may become either: on a CPU its search is another.
    apart = (ours.scales.codes_N.int() - state.absmax.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 0.03
    same = replace(ours, scales=replace(ours.scales, codes_N=state.absmax))
    expected = functional.dequantize_4bit(theirs, state).float()
    rounded = same.dequantise(dtype).float()
    torch.testing.assert_close(
        rounded, expected, rtol=2e-7 if dtype == torch.float32 else 0, atol=0
    )


def test_levels_are_bitsandbytes_own() -> None:
    functional = import_bitsandbytes().functional
    assert torch.equal(torch.tensor(LEVELS), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(make_dynamic_levels(), functional.create_dynamic_map())


def test_the_packed_order_can_be_undone() -> None:
    codes = torch.randint(0, 256, (96, 160), dtype=torch.uint8)
    assert torch.equal(nf4_matrix._unpack(nf4_matrix._pack(codes)), codes)


def test_the_fast_product_is_used_where_the_cpu_has_it() -> None:
    functional = import_bitsandbytes().functional
    assert has_cpu_kernel() == bool(functional.has_avx512bf16())
    weights = quantise_parts("nf4", [random(64, 128)], torch.bfloat16)
    kind = Nf4PackedMatrix if has_cpu_kernel() else Nf4Matrix
    assert type(weights.place(torch.bfloat16)) is kind
    assert type(weights.place(torch.float32)) is Nf4Matrix


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse() -> None:
        raise UnknownWeightFormat("bitsandbytes cannot be used (not there)")

    monkeypatch.setattr(nf4_matrix, "import_bitsandbytes", refuse)
    monkeypatch.setattr(nf4_matrix, "_has_library", lambda: False)
    has_cpu_kernel.cache_clear()
    yield
    has_cpu_kernel.cache_clear()


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_bitsandbytes_a_cpu_is_slow_but_right(dtype: torch.dtype) -> None:
    weights = quantise_parts("nf4", [random(96, 128)], dtype)
    assert isinstance(weights, Nf4Weights)
    matrix = place_nf4(weights, dtype)
    assert torch.equal(dequantise(matrix, dtype), weights.dequantise(dtype))
    assert not has_cpu_kernel()
    assert "choose int8 or int4" in why_slow("nf4", torch.bfloat16, CPU)


def test_a_product_that_changed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_order(self: Nf4PackedMatrix, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.shape[0])

    monkeypatch.setattr(Nf4PackedMatrix, "multiply_packed", other_order)
    has_cpu_kernel.cache_clear()
    try:
        assert not has_cpu_kernel()
    finally:
        has_cpu_kernel.cache_clear()


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import_bitsandbytes()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    bnb.import_bitsandbytes.cache_clear()
    try:
        with pytest.raises(UnknownWeightFormat, match="install it, or choose another"):
            import_bitsandbytes()
    finally:
        bnb.import_bitsandbytes.cache_clear()


def test_nothing_is_imported_before_it_is_needed_and_nothing_said_then() -> None:
    code = (
        "import sys, kernels.span, kernels.quant.formats\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "from kernels.quant.bnb import import_bitsandbytes\n"
        "import_bitsandbytes()\n"
        "assert 'bitsandbytes' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


DEVICES = [
    "cpu",  # where bitsandbytes has the same, by writing the weights out
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_nested", [True, False])
def test_what_gpus_run_gives_the_plain_product(
    device: str, dtype: torch.dtype, is_nested: bool
) -> None:
    weight = random(256, 192).to(device)
    weights = nest_scales(quantise_nf4(weight)) if is_nested else quantise_nf4(weight)
    matrix = Nf4GpuMatrix(weights)
    plain = weights.dequantise(torch.float64)
    for rows in (1, 4, 100):
        x = random(rows, 192).to(device, dtype)
        expected = x.double() @ plain.t()
        step = max(2 * torch.finfo(dtype).eps, 1e-6)
        assert (matrix.multiply(x).double() - expected).norm() < step * expected.norm()
    rounded = plain.to(dtype).double()
    assert (dequantise(matrix, dtype).double() - rounded).abs().max() < step * plain.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_given_bitsandbytes_product() -> None:
    weights = quantise_parts("nf4", [random(64, 64).cuda()], torch.bfloat16)
    assert type(weights.place(torch.bfloat16)) is Nf4GpuMatrix
