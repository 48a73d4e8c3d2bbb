"""Checkpoints that are quantised already: kept as they are, converted, and refused."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.checkpoint import Checkpoint
from kernels.errors import CorruptCheckpoint, UnsupportedModel
from kernels.layer_loader import block_bytes
from kernels.quant.bnb import import_bitsandbytes
from kernels.quant.int4 import Int4Weights
from kernels.quant.int8 import Int8Weights
from kernels.quant.int8_groups import Int8GroupWeights
from kernels.quant.linear import QuantisedLinear
from kernels.quant.matrix import dequantise
from kernels.quant.nf4 import NestedScales, Nf4Weights
from kernels.quant.stored import read_stored
from kernels.span import Span, load_span
from tests.helpers.tiny_models import make_model, save_model

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
OUTPUT = "model.layers.0.self_attn.o_proj"


def save_by_transformers(folder: Path, shape: dict[str, Any], **changes: Any) -> Path:
    """What transformers saves of a model that it loaded in few bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import_bitsandbytes()  # before transformers does, with what it says
    plain = save_model(make_model("llama", **shape), folder / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            plain,
            quantization_config=BitsAndBytesConfig(**changes),
            device_map="cpu",
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder / "quantised", max_shard_size="60KB")
    return folder / "quantised"


KINDS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, save_by_transformers(folder, WIDE, **KINDS[request.param])


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def reference(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """bitsandbytes' own dequantisation."""
    functional = import_bitsandbytes().functional
    weight = tensors[f"{name}.weight"]
    if weight.dtype == torch.int8:
        numbers: torch.Tensor = functional.int8_vectorwise_dequant(weight, tensors[f"{name}.SCB"])
        return numbers.float()
    begin = f"{name}.weight."
    parts = {key[len(begin) :]: part for key, part in tensors.items() if key.startswith(begin)}
    state = functional.QuantState.from_dict(parts, CPU)
    state.dtype = torch.float32
    # As one row, for where blocks go on from row to row its code for CPUs is wrong.
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    plain: torch.Tensor = functional.dequantize_4bit(weight, state)
    return plain.view(shape)


def layers(span: Span, block: int) -> dict[str, Any]:
    qkv, output, _, down = span.block(block).linears
    return {"o_proj": output, "down_proj": down, "qkv": qkv}


def test_weights_stay_as_they_are(quantised: tuple[str, Path]) -> None:
    kind, folder = quantised
    checkpoint = Checkpoint(folder)
    tensors = read_all(folder)
    stem = kind.partition("-")[0]
    for quant in ("none", stem):
        span = load_span(checkpoint, 0, 4, dtype=torch.float32, device=CPU, quant=quant)
        for block in range(4):
            found = layers(span, block)
            begin = f"model.layers.{block}."
            attention = [f"{begin}self_attn.{part}_proj" for part in "qkv"]
            expected = torch.cat([reference(tensors, name) for name in attention])
            for name, theirs in (
                ("qkv", expected),
                ("o_proj", reference(tensors, f"{begin}self_attn.o_proj")),
                ("down_proj", reference(tensors, f"{begin}mlp.down_proj")),
            ):
                assert isinstance(found[name], QuantisedLinear)
                ours = dequantise(found[name].matrix, torch.float32)
                torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=1e-8)


def test_codes_are_the_files_own_bits(quantised: tuple[str, Path]) -> None:
    kind, folder = quantised
    tensors = read_all(folder)
    with Checkpoint(folder).open() as reader:
        stored = read_stored(reader, OUTPUT, (128, 128), method="bitsandbytes", device=CPU)
    assert isinstance(stored, Int8Weights | Nf4Weights)
    assert torch.equal(stored.codes_OI.flatten(), tensors[f"{OUTPUT}.weight"].flatten())
    if isinstance(stored, Nf4Weights):
        assert isinstance(stored.scales, NestedScales) == (kind == "nf4-nested")


def test_another_format_goes_by_numbers(quantised: tuple[str, Path]) -> None:
    kind, folder = quantised
    checkpoint = Checkpoint(folder)
    plain = reference(read_all(folder), OUTPUT)
    for quant, most in (("int8", 0.012), ("int4", 0.1), ("nf4", 0.12)):
        span = load_span(checkpoint, 0, 1, dtype=torch.float32, device=CPU, quant=quant)
        ours = dequantise(layers(span, 0)["o_proj"].matrix, torch.float32)
        if kind.startswith(quant):
            torch.testing.assert_close(ours, plain, rtol=3e-7, atol=1e-8)
        else:
            assert 0 < (ours - plain).norm() < most * plain.norm()


def test_memory_is_planned_by_what_the_checkpoint_has(quantised: tuple[str, Path]) -> None:
    checkpoint = Checkpoint(quantised[1])
    span = load_span(checkpoint, 0, 1, dtype=torch.bfloat16, device=CPU)
    planned = block_bytes(
        checkpoint.config, 0, dtype=torch.bfloat16, quant="none", stored=checkpoint.stored
    )
    assert 0.9 * planned < span.weight_bytes < 1.1 * planned


def test_modules_that_were_skipped_are_numbers(tmp_path: Path) -> None:
    folder = save_by_transformers(
        tmp_path, WIDE, load_in_8bit=True, llm_int8_skip_modules=["o_proj", "q_proj", "lm_head"]
    )
    span = load_span(Checkpoint(folder), 0, 1, dtype=torch.float32, device=CPU)
    found = layers(span, 0)
    assert not isinstance(found["o_proj"], QuantisedLinear)
    assert isinstance(found["down_proj"], QuantisedLinear)
    # One part of three is not quantised: the layer is in numbers, and right.
    assert not isinstance(found["qkv"], QuantisedLinear)
    tensors = read_all(folder)
    expected = torch.cat(
        [
            tensors["model.layers.0.self_attn.q_proj.weight"].float(),
            reference(tensors, "model.layers.0.self_attn.k_proj"),
            reference(tensors, "model.layers.0.self_attn.v_proj"),
        ]
    )
    torch.testing.assert_close(found["qkv"].weight_IO.t(), expected, rtol=3e-7, atol=1e-8)


def test_rows_that_share_blocks_are_read_as_numbers(tmp_path: Path) -> None:
    # Hidden 48, feed-forward 80: blocks of 64 go on from row to row.
    folder = save_by_transformers(
        tmp_path, {}, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    span = load_span(Checkpoint(folder), 0, 1, dtype=torch.float32, device=CPU)
    expected = reference(read_all(folder), OUTPUT)
    ours = layers(span, 0)["o_proj"].weight_IO.t()
    torch.testing.assert_close(ours, expected, rtol=3e-7, atol=1e-8)


Tensors = dict[str, torch.Tensor]


class Held:
    """A reader of tensors in memory."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise CorruptCheckpoint(f"{name} is missing; fetch the model again")
        return self._tensors[name]


def pack_state(**changes: Any) -> torch.Tensor:
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [4, 128],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.2,
    }
    return torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)


def nf4_tensors() -> Tensors:
    functional = import_bitsandbytes().functional
    weight, state = functional.quantize_4bit(
        torch.randn(4, 128), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    parts = state.as_dict(packed=True)
    return {"X.weight": weight} | {f"X.weight.{key}": part for key, part in parts.items()}


def int8_tensors() -> Tensors:
    return {"X.weight": torch.ones(4, 128, dtype=torch.int8), "X.SCB": torch.ones(4)}


def int4_tensors() -> Tensors:
    scales = torch.ones(4, 4, dtype=torch.float16)
    codes = torch.ones(4, 64, dtype=torch.uint8)
    return {"X.weight": codes, "X.weight.scales": scales, "X.weight.minima": scales}


def groups_tensors() -> Tensors:
    scales = torch.ones(4, 4, dtype=torch.float16)
    return {"X.weight": torch.ones(4, 128, dtype=torch.int8), "X.weight.scales": scales}


STATE = "X.weight.quant_state.bitsandbytes__nf4"
INFINITE = torch.tensor(torch.inf)
BROKEN: list[tuple[Callable[[], Tensors], str, torch.Tensor | None]] = [
    (nf4_tensors, STATE, None),
    (nf4_tensors, STATE, torch.zeros(5000, dtype=torch.uint8)),
    (nf4_tensors, STATE, torch.tensor([123, 34], dtype=torch.uint8)),
    (nf4_tensors, STATE, torch.tensor([91] * 3000, dtype=torch.uint8)),
    (nf4_tensors, STATE, torch.tensor([91, 93], dtype=torch.uint8)),
    (nf4_tensors, STATE, torch.zeros(3)),
    (nf4_tensors, STATE, pack_state(shape=[128, 4])),
    (nf4_tensors, STATE, pack_state(shape=None)),
    (nf4_tensors, STATE, pack_state(quant_type="fp4")),
    (nf4_tensors, STATE, pack_state(nested_offset=float("nan"))),
    (nf4_tensors, STATE, pack_state(nested_offset=10**400)),
    (nf4_tensors, STATE, pack_state(nested_offset=1e300)),
    (nf4_tensors, STATE, pack_state(nested_offset="0.2")),
    (nf4_tensors, "X.weight", torch.zeros(255, 1, dtype=torch.uint8)),
    (nf4_tensors, "X.weight", torch.zeros(256, 1, dtype=torch.int64)),
    (nf4_tensors, "X.weight.absmax", torch.zeros(7, dtype=torch.uint8)),
    (nf4_tensors, "X.weight.absmax", torch.zeros(8)),
    (nf4_tensors, "X.weight.absmax", None),
    (nf4_tensors, "X.weight.nested_absmax", torch.zeros(2)),
    (nf4_tensors, "X.weight.nested_absmax", INFINITE.expand(1).clone()),
    (nf4_tensors, "X.weight.nested_absmax", None),
    (nf4_tensors, "X.weight.nested_quant_map", torch.zeros(255)),
    (nf4_tensors, "X.weight.quant_map", torch.zeros(16)),
    (nf4_tensors, "X.weight.quant_map", torch.zeros(17)),
    (int8_tensors, "X.weight", torch.ones(4, 127, dtype=torch.int8)),
    (int8_tensors, "X.weight", torch.ones(4, 128)[:, :64]),
    (int8_tensors, "X.SCB", torch.ones(5)),
    (int8_tensors, "X.SCB", INFINITE.expand(4).clone()),
    (int8_tensors, "X.SCB", None),
    (int4_tensors, "X.weight", torch.ones(4, 65, dtype=torch.uint8)),
    (int4_tensors, "X.weight.scales", torch.ones(4, 4)),
    (int4_tensors, "X.weight.scales", INFINITE.half().expand(4, 4).clone()),
    (int4_tensors, "X.weight.minima", torch.ones(4, 3, dtype=torch.float16)),
    (groups_tensors, "X.weight.scales", torch.ones(4, 5, dtype=torch.float16)),
    (groups_tensors, "X.weight.scales", None),
]


def read_held(make: Callable[[], Tensors], tensors: Tensors) -> Any:
    method = "bitsandbytes" if make in (nf4_tensors, int8_tensors) else "petald"
    return read_stored(Held(tensors), "X", (4, 128), method=method, device=CPU)


@pytest.mark.parametrize(("make", "name", "tensor"), BROKEN)
def test_what_is_broken_is_refused(
    make: Callable[[], Tensors], name: str, tensor: torch.Tensor | None
) -> None:
    tensors = make()
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(CorruptCheckpoint, match="fetch the model again"):
        read_held(make, tensors)


def test_what_is_whole_is_read() -> None:
    for make, kind in (
        (nf4_tensors, Nf4Weights),
        (int8_tensors, Int8Weights),
        (int4_tensors, Int4Weights),
        (groups_tensors, Int8GroupWeights),
    ):
        assert type(read_held(make, make())) is kind


@pytest.mark.parametrize(
    ("make", "name", "tensor", "text"),
    [
        (nf4_tensors, STATE, pack_state(blocksize=128), "blocks of 64"),
        (nf4_tensors, STATE, pack_state(nested_blocksize=64), "blocks of 64"),
        (nf4_tensors, STATE.replace("nf4", "fp4"), pack_state(), "fp4"),
        (int8_tensors, "X.weight_format", torch.tensor(2, dtype=torch.uint8), "by rows"),
    ],
)
def test_what_is_not_known_is_told(
    make: Callable[[], Tensors], name: str, tensor: torch.Tensor, text: str
) -> None:
    with pytest.raises(UnsupportedModel, match=text):
        read_held(make, make() | {name: tensor})


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "petald", "version": 2},
        {"quant_method": ["bitsandbytes"]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_quant_storage": "bfloat16",
        },
        "bitsandbytes",
        [],
    ],
    ids=str,
)
def test_a_folder_that_is_quantised_otherwise_is_refused(tmp_path: Path, section: Any) -> None:
    folder = save_model(make_model("llama"), tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": section}))
    with pytest.raises(UnsupportedModel, match=r"support"):
        Checkpoint(folder)


def test_petalds_own_forms_are_read(tmp_path: Path) -> None:
    folder = save_model(make_model("llama", **WIDE), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    output, down = f"{OUTPUT}.weight", "model.layers.0.mlp.down_proj.weight"
    scales = torch.rand(128, 4, generator=generator).half()
    tensors[output] = torch.randint(-128, 128, (128, 128), generator=generator, dtype=torch.int8)
    tensors[f"{output}.scales"] = scales
    tensors[down] = torch.randint(0, 256, (128, 96), generator=generator, dtype=torch.uint8)
    tensors[f"{down}.scales"] = torch.rand(128, 6, generator=generator).half()
    save_file(tensors, folder / "model.safetensors")
    file = folder / "config.json"
    section = {"quant_method": "petald", "version": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": section}))
    for dtype in (torch.float32, torch.bfloat16):
        span = load_span(Checkpoint(folder), 0, 1, dtype=dtype, device=CPU)
        found = layers(span, 0)
        eights = tensors[output].float().view(128, 4, 32) * scales.float()[..., None]
        codes = torch.stack((tensors[down] >> 4, tensors[down] & 15), -1).view(128, 6, 32)
        fours = (codes.float() - 8) * tensors[f"{down}.scales"].float()[..., None]
        for name, expected in (("o_proj", eights), ("down_proj", fours)):
            matrix = found[name].matrix
            plain = expected.reshape(matrix.shape)
            near = {"rtol": 1e-2 if dtype == torch.bfloat16 else 3e-7, "atol": 1e-6}
            torch.testing.assert_close(dequantise(matrix, torch.float32), plain, **near)
            for rows in (1, 5, 70):
                x = torch.randn(rows, matrix.shape[1], generator=generator).to(dtype)
                product = x.double() @ dequantise(matrix, torch.float64).t()
                error = (matrix.multiply(x).double() - product).norm() / product.norm()
                assert error < (6e-3 if dtype == torch.bfloat16 else 1e-6)
