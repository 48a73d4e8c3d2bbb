"""Spans in every weight format against dense ones with the dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from kernels.errors import UnknownWeightFormat
from kernels.kv_cache import CacheArena
from kernels.quant.formats import FORMATS, WEIGHT_FORMATS
from kernels.span import Segment, Span, load_span
from kernels.span_pass import PassWork, run_backward, run_forward
from tests.helpers.quantised import CPU, load_both
from tests.helpers.run_out import run_out
from tests.helpers.tiny_models import make_model, save_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAIRS = AdapterForm(targets=TARGETS, rank=2, scaling=0.5)
TOKENS = 29
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Widths that all formats take, and with 192 rows of query, key and value side by side.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
# Of sums of some hundred numbers, rounded in other orders.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(scope="module", params=["llama", "llama-biases", "qwen2"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    model = make_model(request.param, **WIDE)
    return Checkpoint(save_model(model, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama", **WIDE), tmp_path_factory.mktemp("llama")))


def random(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    difference = (ours.double() - theirs.double()).norm()
    assert difference <= TOLERANCE[ours.dtype] * theirs.double().norm()


def run_steps(span: Span, rows: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    arena = CacheArena(
        span.config,
        blocks=span.end - span.start,
        capacity_tokens=256,
        dtype=span.dtype,
        device=CPU,
    )
    cache = arena.open(64)
    return torch.cat([span.step(part, [Segment(cache, len(part))]) for part in rows.split(pieces)])


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_any_size_equal_a_dense_spans(
    checkpoint: Checkpoint, quant: str, dtype: torch.dtype
) -> None:
    span, dense = load_both(checkpoint, quant=quant, dtype=dtype)
    rows = random(TOKENS, span.config.hidden_size, dtype=dtype)
    expected = run_steps(dense, rows, [TOKENS])
    for pieces in ([TOKENS], [1] * TOKENS, [3, 20, 1, 5]):
        assert_near(run_steps(span, rows, pieces), expected)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("group_blocks", [1, 4])
def test_passes_and_gradients_equal_a_dense_spans(
    checkpoint: Checkpoint, quant: str, dtype: torch.dtype, group_blocks: int
) -> None:
    both = load_both(checkpoint, quant=quant, dtype=dtype)
    config = checkpoint.config
    values = 0.3 * random(config.num_blocks, row_elements(config, PAIRS), dtype=dtype)
    gradient = random(2, TOKENS, config.hidden_size, dtype=dtype, seed=3)
    found = []
    for span in both:
        work = PassWork(
            hidden_BSD=random(2, TOKENS, config.hidden_size, dtype=dtype),
            start=0,
            end=config.num_blocks,
            trained=SpanAdapter(config, PAIRS, 0, values),
        )
        output = run_out(run_forward(span, work))
        of = run_out(run_backward(span, work, gradient, group_blocks=group_blocks))
        assert of.adapter_LE is not None
        found.append((output, of.hidden_BSD, of.adapter_LE))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_a_graph_keeps_no_more_than_a_dense_spans(
    llama: Checkpoint, quant: str, dtype: torch.dtype
) -> None:
    # So what `graph_bytes` foretells, and the passes that are planned by it, hold as they are.
    kept = []
    for span in load_both(llama, quant=quant, dtype=dtype, end=1):
        held = {tensor.untyped_storage().data_ptr() for tensor in _tensors(span)}
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        hidden = random(2, 64, span.config.hidden_size, dtype=dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = span.forward(hidden)
        assert output.requires_grad
        kept.append(sum(size for at, size in storages.items() if at not in held))
    assert 0 < kept[0] <= kept[1]


@pytest.mark.parametrize("quant", FORMATS)
def test_memory_is_as_told(llama: Checkpoint, quant: str) -> None:
    span, dense = load_both(llama, quant=quant, dtype=torch.bfloat16)
    weights = sum(tensor.nbytes for tensor in _tensors(span))
    assert span.weight_bytes == weights
    # Norms and scales weigh much in so small a model; the dense span has two bytes for each.
    told = FORMATS[quant].bytes_per_weight / 2
    assert told <= span.weight_bytes / dense.weight_bytes < told + 0.08


def _tensors(span: Span) -> list[torch.Tensor]:
    found = []
    for number in range(span.start, span.end):
        block = span.block(number)
        found += block.tensors
        for layer in block.linears:
            found += layer.tensors
    return found


@pytest.mark.parametrize("quant", FORMATS)
def test_odd_widths_are_right_as_well(tmp_path: Path, quant: str) -> None:
    # Hidden 48, feed-forward 80: what a format does not take stays dense.
    checkpoint = Checkpoint(save_model(make_model("qwen2"), tmp_path))
    for dtype, tolerance in ((torch.float32, 0.25), (torch.bfloat16, 0.25)):
        rows = random(TOKENS, 48, dtype=dtype)
        exact = load_span(checkpoint, 0, 4, dtype=torch.float32, device=CPU)
        span = load_span(checkpoint, 0, 4, dtype=dtype, device=CPU, quant=quant)
        expected = run_steps(exact, rows.float(), [TOKENS])
        for pieces in ([TOKENS], [1] * TOKENS):
            ours = run_steps(span, rows, pieces).float()
            assert (ours - expected).norm() < tolerance * expected.norm()


def test_an_unknown_format_is_refused_with_those_that_are_known(llama: Checkpoint) -> None:
    with pytest.raises(UnknownWeightFormat, match="'int3'.*" + ", ".join(WEIGHT_FORMATS)):
        load_span(llama, 0, 1, dtype=torch.float32, device=CPU, quant="int3")


def test_layers_are_quantised_one_at_a_time(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    events: list[str] = []
    from kernels import checkpoint as module
    from kernels.layer_loader import LayerLoader

    plain_read, plain_make = module.TensorReader.read, LayerLoader.make_linear

    def note_read(self: Any, name: str) -> torch.Tensor:
        read.append(name)
        return plain_read(self, name)

    def note_made(self: Any, names: Any) -> Any:
        read.clear()
        layer = plain_make(self, names)
        assert [name for name in read if name.endswith("proj.weight")] == [
            f"{name}.weight" for name in names
        ]
        events.append(names[0])
        return layer

    monkeypatch.setattr(module.TensorReader, "read", note_read)
    monkeypatch.setattr(LayerLoader, "make_linear", note_made)
    load_span(llama, 0, 2, dtype=torch.bfloat16, device=CPU, quant="int8")
    assert len(events) == 8
