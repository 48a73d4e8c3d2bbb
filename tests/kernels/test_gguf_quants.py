"""GGUF tensors that are kept in few bits: the same numbers as GGUF's own, in less space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kernels.checkpoint import Checkpoint
from kernels.errors import CorruptCheckpoint
from kernels.gguf_import import import_gguf
from kernels.model_store import fingerprint
from kernels.quant.linear import QuantisedLinear
from kernels.quant.matrix import dequantise
from kernels.span import Span, load_span
from tests.helpers.tiny_gguf import TinyModel, write_tiny_gguf

Types = gguf.GGMLQuantizationType
KEPT = (Types.Q8_0, Types.Q4_0, Types.Q4_1)
CPU = torch.device("cpu")


def make_folders(tmp_path: Path, model: TinyModel) -> tuple[Path, Path]:
    """The same file with its quantised tensors kept, and as numbers."""
    file = write_tiny_gguf(tmp_path / "tiny.gguf", model)
    import_gguf(file, tmp_path / "kept", keep_quantised=True)
    import_gguf(file, tmp_path / "plain")
    return tmp_path / "kept", tmp_path / "plain"


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Span:
    return load_span(Checkpoint(folder), 0, 3, dtype=dtype, device=CPU, **settings)


def layers(span: Span) -> list[Any]:
    found: list[Any] = []
    for number in range(span.start, span.end):
        block = span.block(number)
        found += block.linears
    return found


@pytest.mark.parametrize("kind", KEPT, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_kept_layers_are_gguf_s_own_numbers(tmp_path: Path, kind: Types, architecture: str) -> None:
    has_bias = architecture == "qwen2"
    model = TinyModel(architecture=architecture, quantisation=kind, has_query_bias=has_bias)
    kept, plain = make_folders(tmp_path, model)
    # The rows of query and key are interleaved in a Llama's file; both folders have them in order.
    for ours, numbers in zip(layers(load(kept)), layers(load(plain)), strict=True):
        assert isinstance(ours, QuantisedLinear)
        weight = dequantise(ours.matrix, torch.float32)
        # The folder of numbers is in float16.
        torch.testing.assert_close(weight, numbers.weight_IO.t(), rtol=5e-4, atol=1e-7)
    name = "model.layers.1.mlp.down_proj.weight"
    packed = gguf.quants.quantize(model.tensors()[name], kind)
    exact = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    ours = layers(load(kept))[7]
    torch.testing.assert_close(dequantise(ours.matrix, torch.float32), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KEPT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_span_of_kept_layers_computes_the_same(
    tmp_path: Path, kind: Types, dtype: torch.dtype
) -> None:
    kept, plain = make_folders(tmp_path, TinyModel(quantisation=kind))
    hidden = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    expected = load(plain).forward(hidden)
    ours = load(kept, dtype).forward(hidden.to(dtype)).float()
    most = 2e-3 if dtype == torch.float32 else 3e-2
    assert (ours - expected).norm() < most * expected.norm()


@pytest.mark.parametrize("kind", KEPT, ids=str)
def test_kept_layers_take_the_files_own_space(tmp_path: Path, kind: Types) -> None:
    kept, plain = make_folders(tmp_path, TinyModel(quantisation=kind, vocab_size=300))
    index = json.loads((kept / "model.safetensors.index.json").read_text())
    blocks = [name for name in index["weight_map"] if ".layers." in name]
    assert any(name.endswith(".weight.scales") for name in blocks)
    assert any(name.endswith(".weight.minima") for name in blocks) == (kind == Types.Q4_1)
    size, like = (
        sum(tensor.nbytes for name, tensor in read_all(folder).items() if "proj.weight" in name)
        for folder in (kept, plain)
    )
    assert size == like * {Types.Q8_0: 8.5, Types.Q4_0: 4.5, Types.Q4_1: 5.0}[kind] / 16
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_all(kept).values())
    config = json.loads((kept / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "petald", "version": 1}
    assert config["torch_dtype"] == "float16"
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())


def test_kept_bytes_are_always_the_same(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", TinyModel(quantisation=Types.Q4_0))
    prints = []
    for name, keep in (("one", True), ("two", True), ("plain", False)):
        import_gguf(file, tmp_path / name, keep_quantised=keep)
        prints.append(fingerprint(tmp_path / name, root=tmp_path))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("kind", KEPT, ids=str)
def test_another_format_goes_by_numbers(tmp_path: Path, kind: Types) -> None:
    kept, _ = make_folders(tmp_path, TinyModel(quantisation=kind))
    as_is = layers(load(kept))[1].matrix
    for quant in ("int8", "int4", "nf4"):
        other = layers(load(kept, quant=quant))[1].matrix
        theirs, ours = (dequantise(matrix, torch.float32) for matrix in (as_is, other))
        assert (ours - theirs).norm() < 0.13 * theirs.norm()
        assert (type(other) is type(as_is)) == (quant == "int4" and kind != Types.Q8_0)


def test_what_cannot_be_kept_becomes_numbers(tmp_path: Path) -> None:
    kept, plain = make_folders(tmp_path, TinyModel(quantisation=Types.Q5_0))
    assert fingerprint(kept, root=tmp_path) == fingerprint(plain, root=tmp_path)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", TinyModel(quantisation=Types.Q8_0))
    reader = gguf.GGUFReader(file)
    place = next(t for t in reader.tensors if t.name == "blk.1.attn_q.weight").data_offset
    data = bytearray(file.read_bytes())
    data[place : place + 2] = np.array([np.inf], np.float16).tobytes()
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"blk\.1\.attn_q\.weight"):
        import_gguf(file, tmp_path / "kept", keep_quantised=True)
    assert not (tmp_path / "kept").exists()
