"""Where decode steps have a kernel for attention, and that all goes on where they have none."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import decode_kernel
from kernels.block import Place
from kernels.decode_kernel import DecodeKernel, place_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class TritonError(Exception):
    """As Triton's, which need not be there."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What there is in the kernels' place, on a GPU of 2020."""
    module: Any = ModuleType("kernels.triton.decode_attention")
    module.attend = lambda *about: None
    module.can_attend = lambda dtype, heads, kv_heads, head_size: head_size <= 256
    errors: Any = ModuleType("triton.errors")
    errors.TritonError = TritonError
    monkeypatch.setitem(sys.modules, "kernels.triton.decode_attention", module)
    monkeypatch.setitem(sys.modules, "triton.errors", errors)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(decode_kernel, "_try_out", lambda *about: None)
    return module


def find(device: torch.device, dtype: torch.dtype, head_size: int = 64) -> DecodeKernel | None:
    return decode_kernel.find_decode_kernel.__wrapped__(device, dtype, 8, 2, head_size)


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*about: object) -> None:
        raise error

    return fail


def test_of_what_is_on_a_gpu_alone(stand_in: Any) -> None:
    assert find(GPU, torch.bfloat16) is stand_in.attend
    assert find(CPU, torch.bfloat16) is None
    assert find(GPU, torch.bfloat16, head_size=512) is None


def test_of_no_old_gpu(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert find(GPU, torch.bfloat16) is None
    assert find(GPU, torch.float16) is stand_in.attend
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert find(GPU, torch.float16) is None


@pytest.mark.parametrize(
    "error",
    [
        TritonError("out of resource"),
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, "cc"),
        PermissionError("no cache"),
    ],
)
def test_what_cannot_be_compiled_is_told_and_done_without(
    stand_in: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    monkeypatch.setattr(decode_kernel, "_try_out", fail_with(error))
    with caplog.at_level(logging.WARNING):
        assert find(GPU, torch.float32) is None
    assert str(error) in caplog.text


def test_want_of_memory_is_no_want_of_a_kernel(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_kernel, "_try_out", fail_with(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError):
        find(GPU, torch.float32)


def test_the_try_wants_zeros_of_zeros() -> None:
    sizes = []

    def kernel(projected: Any, cache: Any, places_2S: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append([tuple(part.shape) for part in (*projected, *cache)])
        return torch.full((1, 8), float(len(sizes) - 1))

    try_out = decode_kernel._try_out
    try_out(kernel, CPU, torch.float32, (4, 2, 3))
    assert sizes == [[(1, 4, 3), (1, 2, 3), (1, 2, 3), (2, 64, 3), (2, 64, 3)]]
    with pytest.raises(RuntimeError, match="zeros"):
        try_out(kernel, CPU, torch.float32, (4, 2, 3))


def test_places_as_a_kernel_reads_them() -> None:
    places_2S = place_rows([Place(0, 1, 64, 5), Place(1, 1, 0, 63)], CPU)
    assert places_2S.tolist() == [[64, 0], [5, 63]]
    assert places_2S.dtype == torch.int64
