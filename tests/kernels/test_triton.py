"""The Triton kernels without a GPU: they give what the plain ways do, and compile for one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels.codecs import int8
from kernels.codecs.registry import find_codec

ROOT = Path(__file__).parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; pip install -e '.[test]' brings it",
)

COMPILE = """
import itertools
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kernels.triton import int8

SIGNATURES = {
    int8._encode: ["{rows}", "*u8", "*i32", "i32", "i32", "i32", "i32", "fp32"],
    int8._decode: ["*u8", "{rows}", "i32", "i32", "i32", "i32"],
}
KINDS = {"*fp32": (False, False), "*i16": (True, False), "*fp16": (False, True)}
for function, (rows, (is_bfloat16, is_float16)) in itertools.product(SIGNATURES, KINDS.items()):
    values = {
        "IS_BFLOAT16": is_bfloat16,
        "IS_FLOAT16": is_float16,
        "GROUP_VALUES": 64,
        "GROUPS": int8.GROUPS_AT_ONCE,
    }
    constants = {name: value for name, value in values.items() if name in function.arg_names}
    types = [kind.format(rows=rows) for kind in SIGNATURES[function]]
    types += ["constexpr"] * len(constants)
    source = ASTSource(
        fn=function,
        signature=dict(zip(function.arg_names, types, strict=True)),
        constexprs=constants,
    )
    options = {"enable_fp_fusion": False}
    made = compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert made.asm["cubin"]
    assert "fma" not in made.asm["ptx"]
"""

COMPILE_ATTENTION = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kernels.triton import decode_attention as kernels

SHAPES = [("bf16", 4, 128, 64), ("fp16", 1, 96, 64), ("fp32", 3, 256, 16)]
for kind, shared, head_size, tokens in SHAPES:
    values = {
        "SHARED": shared,
        "PADDED_SHARED": 16,
        "HEAD_SIZE": head_size,
        "WIDTH": 1 << (head_size - 1).bit_length(),
        "TOKENS": tokens,
        "MAX_PARTS": kernels.MAX_PARTS,
    }
    of_attend = ["*" + kind] * 5 + ["*i64", "*fp32", "*fp32"] + ["i32"] * 7 + ["fp32", "i32"]
    of_join = ["*fp32", "*fp32", "*i64", "*" + kind, "i32", "i32"]
    for function, types in ((kernels._attend, of_attend), (kernels._join, of_join)):
        constants = {name: value for name, value in values.items() if name in function.arg_names}
        types = types + ["constexpr"] * len(constants)
        source = ASTSource(
            fn=function,
            signature=dict(zip(function.arg_names, types, strict=True)),
            constexprs=constants,
        )
        options = {"enable_fp_fusion": True, "num_stages": 2}
        made = compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        assert made.asm["cubin"]
        assert made.metadata.shared < 96 << 10  # fits all since Volta
        # Sixteen bits go to tensor cores; 32 bits are multiplied as such.
        assert ("mma.sync" in made.asm["ptx"]) == (function is kernels._attend and kind != "fp32")
"""


def run_python(arguments: list[str], folder: Path, **extra: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(folder),
        **extra,
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_kernels_give_the_bits_of_the_plain_codec(tmp_path: Path) -> None:
    arguments = ["-m", "tests.helpers.triton_interpreted"]
    started = run_python(arguments, tmp_path, TRITON_INTERPRET="1")
    assert int(started) > 100


@needs_triton
def test_kernels_compile_for_a_gpu_without_fusing(tmp_path: Path) -> None:
    run_python(["-c", COMPILE], tmp_path, TRITON_INTERPRET="0")


@needs_triton
def test_attention_kernels_give_what_the_plain_way_does(tmp_path: Path) -> None:
    arguments = ["-m", "tests.helpers.decode_interpreted"]
    cases = run_python(arguments, tmp_path, TRITON_INTERPRET="1")
    assert int(cases) == 12


@needs_triton
def test_attention_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    run_python(["-c", COMPILE_ATTENTION], tmp_path, TRITON_INTERPRET="0")


def test_the_codec_takes_the_kernels_for_what_is_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in: Any = ModuleType("kernels.triton.int8")
    stand_in.DTYPES = (torch.float32,)
    monkeypatch.setattr(int8, "_load_fused", lambda: stand_in)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert int8.find_fused(gpu, torch.float32) is stand_in
    assert int8.find_fused(gpu, torch.float64) is None
    assert int8.find_fused(cpu, torch.float32) is None
    monkeypatch.setattr(int8, "_load_fused", lambda: None)
    assert int8.find_fused(gpu, torch.float32) is None


def test_the_codec_gives_what_the_kernels_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    stand_in: Any = ModuleType("kernels.triton.int8")

    def encode_int8(rows: torch.Tensor, data: torch.Tensor, *rest: object) -> bool:
        taken.append("encode")
        data.fill_(7)
        return True

    def decode_int8(data: torch.Tensor, rows: torch.Tensor, *rest: object) -> None:
        taken.append("decode")
        rows.fill_(8)

    stand_in.encode_int8, stand_in.decode_int8 = encode_int8, decode_int8
    monkeypatch.setattr(int8, "find_fused", lambda device, dtype: stand_in)
    codec = find_codec("int8")
    data = codec.encode(torch.zeros(2, 64))
    assert torch.equal(data, torch.full((2, 66), 7, dtype=torch.uint8))
    assert torch.equal(codec.decode(data, 64, torch.float32), torch.full((2, 64), 8.0))
    assert taken == ["encode", "decode"]
