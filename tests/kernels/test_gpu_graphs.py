"""Recorded decode steps on a GPU: they are taken, give what the others give, and cost little."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from kernels.codecs.registry import find_codec
from kernels.kv_cache import CacheArena
from kernels.quant.int8_gpu import Int8GpuMatrix
from kernels.span import Segment, Span
from kernels.step_graphs import MAX_PARTS, MAX_ROWS, RECORD_AT, CudaRecorder
from kernels.weight_names import linear_sizes
from tests.helpers.gpu import GPU, error_of, needs_gpu
from tests.helpers.tiny_models import FAMILIES, make_model, save_model
from tests.kernels.test_step_graphs import decode, decode_parts, load, open_caches

pytestmark = needs_gpu

ROUNDING = 1e-4
"""Far below the error of a wrong row, and above what another order of additions makes."""


class CountedRecorder:
    """CUDA's recorder, which counts."""

    def __init__(self) -> None:
        self._record = CudaRecorder(GPU)
        self.recorded = 0
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = self._record(work)
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            graph()

        return replay


def save_tiny(folder: Path, name: str = "llama", **changes: int) -> Checkpoint:
    return Checkpoint(save_model(make_model(name, **changes), folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_of_every_family(tmp_path: Path, name: str) -> None:
    checkpoint = save_tiny(tmp_path, name)
    span, record = load(checkpoint, device=GPU), CountedRecorder()
    expected_SD = decode(span, [1, 3])
    can_record = span.record_steps(record)
    assert can_record != bool(checkpoint.config.num_experts)
    assert error_of(decode(span, [1, 3]), expected_SD) < ROUNDING
    assert span.graphs_failure == ""
    # One for a whole step, where attention is a kernel; or else one more than there are blocks.
    graphs = 1 if checkpoint.config.has_plain_scores else checkpoint.config.num_blocks + 1
    assert record.recorded == (2 * graphs if can_record else 0)
    assert record.replays == (2 * 6 * graphs if can_record else 0)


@pytest.mark.parametrize("quant", ["none", "nf4", "int4", "int8"])
def test_of_sixteen_bits_and_less(tmp_path: Path, quant: str) -> None:
    checkpoint = save_tiny(tmp_path, hidden_size=192, intermediate_size=384)
    span, record = load(checkpoint, quant=quant, device=GPU), CountedRecorder()
    if quant == "none":
        span = load_bfloat16(checkpoint)
    expected_SD = decode(span, [2, 5])
    # LLM.int8() asks the device at every product which features are outliers.
    assert span.record_steps(record) == (quant != "int8")
    assert error_of(decode(span, [2, 5]), expected_SD) < 0.02
    assert span.graphs_failure == ""
    assert (record.replays > 0) == (quant != "int8")


def load_bfloat16(checkpoint: Checkpoint) -> Span:
    from kernels.span import load_span

    end = checkpoint.config.num_blocks
    return load_span(checkpoint, 0, end, dtype=torch.bfloat16, device=GPU)


def test_of_every_number_of_rows(tmp_path: Path) -> None:
    span, record = load(save_tiny(tmp_path), device=GPU), CountedRecorder()
    counts = [*range(1, MAX_ROWS + 2), 1, MAX_ROWS]
    expected_SD = decode(span, counts, tokens=2)
    span.record_steps(record)
    assert error_of(decode(span, counts, tokens=2), expected_SD) < ROUNDING
    assert span.graphs_failure == ""
    assert record.recorded == MAX_ROWS
    assert record.replays == 2 * (len(counts) - 1)  # one is of too many rows


def test_recording_keeps_little_memory(tmp_path: Path) -> None:
    span = load(save_tiny(tmp_path), device=GPU)
    counts = [*range(1, MAX_ROWS + 1)]
    decode(span, counts, tokens=1)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, free_before = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    span.record_steps(record := CountedRecorder())
    decode(span, counts, tokens=1)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    kept_mib = (torch.cuda.memory_reserved() - before) >> 20
    gone_mib = (free_before - torch.cuda.mem_get_info()[0]) >> 20
    print(f"{record.recorded} graphs keep {kept_mib} MiB of torch's, {gone_mib} MiB of the device")
    # cuBLAS keeps 32 MiB for the stream of the recordings, and torch rounds up to such pieces.
    assert kept_mib <= 100


def test_of_caches_that_move_and_are_packed_anew(tmp_path: Path) -> None:
    span, record = load(save_tiny(tmp_path), device=GPU), CountedRecorder()

    def run() -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(3)
        arena = CacheArena(span.config, blocks=4, capacity_tokens=448, dtype=span.dtype, device=GPU)
        caches = [arena.open(64), arena.open(192), arena.open(128)]
        outputs = []
        for step in range(150):
            going = [cache for cache in caches if cache.length < cache.max_tokens]
            if step == 64:
                caches[0].close()
                going = going[-2:]
                caches = caches[1:]
            rows_SD = torch.randn(len(going), 48, generator=generator).to(GPU)
            outputs.append(span.step(rows_SD, [Segment(cache, 1) for cache in going]))
        return torch.cat(outputs), arena.statistics().moves

    expected_SD, moves = run()
    assert moves
    span.record_steps(record)
    assert error_of(run()[0], expected_SD) < ROUNDING
    assert record.replays == 150


def test_of_a_part_of_the_span(tmp_path: Path) -> None:
    span, record = load(save_tiny(tmp_path), device=GPU), CountedRecorder()

    def run() -> torch.Tensor:
        (cache,) = open_caches(span, 1)
        rows_SD = torch.randn(9, 48, generator=torch.Generator().manual_seed(1)).to(GPU)
        return torch.cat(
            [span.step(row_SD[None], [Segment(cache, 1)], start=1, end=3) for row_SD in rows_SD]
        )

    expected_SD = run()
    span.record_steps(record)
    assert error_of(run(), expected_SD) < ROUNDING
    assert (record.recorded, record.replays) == (1, 9 - RECORD_AT + 1)


def test_of_many_parts_of_the_span(tmp_path: Path) -> None:
    span, record = load(save_tiny(tmp_path), device=GPU), CountedRecorder()
    caches = open_caches(span, 3)
    expected_SD = decode_parts(span, caches)
    span.record_steps(record)
    assert error_of(decode_parts(span, caches), expected_SD) < ROUNDING
    assert span.graphs_failure == ""
    assert span._graphs is not None
    assert span._graphs.recorded == MAX_PARTS + 3
    assert record.recorded > span._graphs.recorded


def test_steps_with_adapters_are_not_recorded_and_right(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path)
    form = AdapterForm(targets=tuple(linear_sizes(checkpoint.config)), rank=2, scaling=0.5)
    shape = (4, row_elements(checkpoint.config, form))
    values = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(7))

    def run(span: Span) -> torch.Tensor:
        adapter = SpanAdapter(span.config, form, 0, values.to(span.device))
        plain, adapted = open_caches(span, 2)
        outputs = []
        generator = torch.Generator().manual_seed(8)
        for _ in range(5):
            rows_SD = torch.randn(1, 48, generator=generator).to(span.device)
            outputs.append(span.step(rows_SD, [Segment(plain, 1)]))
            outputs.append(span.step(rows_SD, [Segment(adapted, 1)], adapters=[adapter]))
        return torch.cat(outputs)

    span, record = load(checkpoint, device=GPU), CountedRecorder()
    span.record_steps(record)
    outputs_SD = run(span)
    assert record.replays == 5
    assert error_of(outputs_SD, run(load(checkpoint))) < ROUNDING
    assert error_of(outputs_SD[::2], outputs_SD[1::2]) > 0.01


@contextmanager
def busy_threads(count: int = 3) -> Iterator[list[int]]:
    """Others that use the GPU meanwhile, as those do that encode what is sent; counts rounds."""
    is_over = threading.Event()
    rounds = [0] * count
    codec = find_codec("int8")

    def work(number: int) -> None:
        while not is_over.is_set():
            rows_SD = torch.randn(3, 200 + number).to(GPU)  # a GPU's chance is recorded, too
            data_SR = codec.encode(rows_SD)
            decoded_SD = codec.decode(data_SR, rows_SD.shape[1], rows_SD.dtype).to(GPU)
            assert error_of(decoded_SD, rows_SD) < 0.02
            rounds[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield rounds
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_others_use_the_gpu_while_steps_are_recorded(tmp_path: Path) -> None:
    span, record = load(save_tiny(tmp_path), device=GPU), CountedRecorder()
    expected_SD = decode(span, [1, 2, 3, 4])
    span.record_steps(record)
    with busy_threads() as rounds:
        outputs_SD = decode(span, [1, 2, 3, 4])
    assert span.graphs_failure == ""
    assert error_of(outputs_SD, expected_SD) < ROUNDING
    assert record.replays == 4 * 6
    assert all(rounds)


def test_what_a_gpu_cannot_record_is_run_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_tiny(tmp_path, hidden_size=192, intermediate_size=384)
    span = load(checkpoint, quant="int8", device=GPU)
    expected_SD = decode(span, [1, 2])
    monkeypatch.setattr(Int8GpuMatrix, "is_fixed", True)
    assert span.record_steps(CudaRecorder(GPU))
    assert error_of(decode(span, [1, 2]), expected_SD) < ROUNDING
    assert span.graphs_failure
    print(span.graphs_failure[:200])
    # ... and whatever else the device is to do, it does, another span's recording included.
    other, record = load(checkpoint, device=GPU), CountedRecorder()
    plain_SD = decode(other, [1])
    other.record_steps(record)
    assert error_of(decode(other, [1]), plain_SD) < ROUNDING
    assert record.replays
