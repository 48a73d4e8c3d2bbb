"""Recorded decode steps against those that are not: to the same bits; here without a GPU."""

from __future__ import annotations

import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kernels import block as block_module
from kernels import step_graphs
from kernels.checkpoint import Checkpoint
from kernels.errors import OutOfDeviceMemory
from kernels.kv_cache import CacheArena, SequenceCache
from kernels.span import Segment, Span, load_span
from kernels.step_graphs import MAX_PARTS, MAX_ROWS, RECORD_AT, WARM_UPS
from tests.helpers.decode_cases import attend_in_turn
from tests.helpers.tiny_models import FAMILIES, make_model, save_model

CPU = torch.device("cpu")


class Replayer:
    """A recorder for the CPU, which does the work again; it runs it as often as CUDA's does.

    Attributes:
        recorded: all that it made.
        replays: how often one of them was run.
    """

    def __init__(self) -> None:
        self.recorded: list[weakref.ref[Callable[[], None]]] = []
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        for _ in range(WARM_UPS):
            work()

        def replay() -> None:
            self.replays += 1
            work()

        self.recorded.append(weakref.ref(replay))
        return replay


def open_caches(span: Span, count: int) -> list[SequenceCache]:
    arena = CacheArena(
        span.config,
        blocks=span.end - span.start,
        capacity_tokens=64 * MAX_ROWS * 2,
        dtype=span.dtype,
        device=span.device,
    )
    return [arena.open(64) for _ in range(count)]


def decode(span: Span, counts: Sequence[int], tokens: int = 6) -> torch.Tensor:
    """Prefills sequences of several lengths, then decodes some of them together, in turn."""
    generator = torch.Generator().manual_seed(0)
    width = span.config.hidden_size
    caches = open_caches(span, max(counts))
    outputs = []
    for number, cache in enumerate(caches):
        rows_SD = torch.randn(3 + number, width, generator=generator)
        rows_SD = rows_SD.to(span.device, span.dtype)
        outputs.append(span.step(rows_SD, [Segment(cache, 3 + number)]))
    for _ in range(tokens):
        for count in counts:
            rows_SD = torch.randn(count, width, generator=generator).to(span.device, span.dtype)
            outputs.append(span.step(rows_SD, [Segment(cache, 1) for cache in caches[:count]]))
    return torch.cat(outputs)


def decode_parts(
    span: Span, caches: Sequence[SequenceCache], *, times: int = RECORD_AT + 1
) -> torch.Tensor:
    """Steps through all blocks, and then through every part of them, in one to three rows."""
    generator = torch.Generator().manual_seed(0)
    blocks = span.end - span.start
    parts = [(start, end) for start in range(blocks) for end in range(start + 1, blocks + 1)]
    outputs = []
    for start, end in [(0, blocks), *parts]:
        for count in (1, 2, 3):
            for _ in range(times):
                rows_SD = torch.randn(count, span.config.hidden_size, generator=generator)
                rows_SD = rows_SD.to(span.device, span.dtype)
                segments = [Segment(cache, 1) for cache in caches[:count]]
                outputs.append(span.step(rows_SD, segments, start=start, end=end))
                for cache in caches:
                    cache.length = 0
    return torch.cat(outputs)


def load(
    checkpoint: Checkpoint, *, quant: str = "none", device: torch.device = CPU, start: int = 0
) -> Span:
    dtype = torch.float32 if quant == "none" else torch.bfloat16
    end = checkpoint.config.num_blocks
    return load_span(checkpoint, start, end, dtype=dtype, device=device, quant=quant)


@pytest.mark.parametrize("name", FAMILIES)
def test_of_every_family(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint(save_model(make_model(name), tmp_path))
    span, record = load(checkpoint), Replayer()
    expected_SD = decode(span, [1, 3])
    can_record = span.record_steps(record)
    assert can_record != bool(checkpoint.config.num_experts)
    assert torch.equal(decode(span, [1, 3]), expected_SD)
    steps, blocks = 2 * 6, checkpoint.config.num_blocks
    assert record.replays == (steps * (blocks + 1) if can_record else 0)
    assert not span.graphs_failure


@pytest.mark.parametrize("quant", ["int8", "nf4", "int4"])
def test_of_quantised_weights(tmp_path: Path, quant: str) -> None:
    checkpoint = Checkpoint(save_model(make_model("llama", hidden_size=192), tmp_path))
    span, record = load(checkpoint, quant=quant), Replayer()
    expected_SD = decode(span, [2])
    assert span.record_steps(record)
    assert torch.equal(decode(span, [2]), expected_SD)
    assert record.replays


def test_of_a_part_of_the_span(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(make_model("llama"), tmp_path))
    span, record = load(checkpoint), Replayer()

    def run() -> torch.Tensor:
        (cache,) = open_caches(span, 1)
        rows_SD = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
        pieces = [
            span.step(row_SD[None], [Segment(cache, 1)], start=start, end=end)
            for row_SD, (start, end) in zip(rows_SD, [(1, 3)] * (RECORD_AT + 2), strict=False)
        ]
        return torch.cat(pieces)

    expected_SD = run()
    span.record_steps(record)
    assert torch.equal(run(), expected_SD)
    assert record.replays == 3 * 3


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_of_parts_of_the_span_only_some_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(block_module, "find_decode_kernel", lambda *about: attend_in_turn)
    checkpoint = Checkpoint(save_model(make_model(name), tmp_path))
    span, record = load(checkpoint), Replayer()
    caches = open_caches(span, 3)
    expected_SD = decode_parts(span, caches)
    assert span.record_steps(record)
    decode_parts(span, caches, times=1)
    whole = 3 * (1 if name == "llama" else 1 + checkpoint.config.num_blocks)
    assert len(record.recorded) == whole  # nothing but the whole is recorded at once
    assert torch.equal(decode_parts(span, caches), expected_SD)

    alive = [one for one in record.recorded if one() is not None]
    assert span._graphs is not None
    assert len(alive) == span._graphs.recorded < len(record.recorded)
    assert alive[:whole] == record.recorded[:whole]
    if name == "llama":
        assert len(alive) == whole + MAX_PARTS


def test_of_parts_of_the_span_the_one_used_longest_ago_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_module, "find_decode_kernel", lambda *about: attend_in_turn)
    monkeypatch.setattr(step_graphs, "MAX_PARTS", 2)
    span = load(Checkpoint(save_model(make_model("llama"), tmp_path)))
    span.record_steps(record := Replayer())
    (cache,) = open_caches(span, 1)

    def recorded_by(*starts: int) -> int:
        before = len(record.recorded)
        for start in starts:
            span.step(torch.zeros(1, 48), [Segment(cache, 1)], start=start, end=start + 1)
        return len(record.recorded) - before

    assert recorded_by(0, 0) == 0
    assert recorded_by(0) == 1
    assert recorded_by(1, 1, 1) == 1
    assert recorded_by(0, 2, 2, 2) == 1  # in the place of 1
    assert recorded_by(0, 2, 0) == 0
    assert recorded_by(1, 1) == 0
    assert recorded_by(1) == 1


@pytest.mark.parametrize(
    ("name", "graphs"),
    [("llama", 1), ("mistral-window", 1), ("gemma3", 1), ("qwen3-window", 1), ("gemma2", 5)],
)
def test_of_whole_steps_where_attention_is_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, graphs: int
) -> None:
    checkpoint = Checkpoint(save_model(make_model(name), tmp_path))
    expected_SD = decode(load(checkpoint), [1, 3])
    monkeypatch.setattr(block_module, "find_decode_kernel", lambda *about: attend_in_turn)
    span, record = load(checkpoint), Replayer()
    assert span.record_steps(record)
    assert torch.equal(decode(span, [1, 3]), expected_SD)
    assert record.replays == 2 * 6 * graphs


def test_of_whole_steps_of_one_arena_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(save_model(make_model("llama"), tmp_path))
    expected_SD = decode(load(checkpoint), [2])
    monkeypatch.setattr(block_module, "find_decode_kernel", lambda *about: attend_in_turn)
    span = load(checkpoint)
    span.record_steps(Replayer())
    for _ in range(2):
        assert torch.equal(decode(span, [2]), expected_SD)
    assert span._graphs is not None
    assert span._graphs.recorded == 1


def test_unrecorded_steps_take_the_kernel_for_several_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(save_model(make_model("mixtral-window"), tmp_path))
    expected_SD = decode(load(checkpoint), [1, 3])
    taken = []

    def counted(*about: Any) -> torch.Tensor:
        taken.append(about[2].shape[1])
        return attend_in_turn(*about)

    monkeypatch.setattr(block_module, "find_decode_kernel", lambda *about: counted)
    assert torch.equal(decode(load(checkpoint), [1, 3]), expected_SD)
    assert taken == [3] * 6 * 4


def test_prefills_and_large_batches_are_not_recorded(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(make_model("llama"), tmp_path))
    span, record = load(checkpoint), Replayer()
    span.record_steps(record)
    caches = open_caches(span, MAX_ROWS + 1)
    span.step(torch.randn(2, 48), [Segment(caches[0], 2)])
    rows_SD = torch.randn(MAX_ROWS + 1, 48)
    span.step(rows_SD, [Segment(cache, 1) for cache in caches])
    assert record.replays == 0


class TritonError(Exception):
    """As Triton's, which need not be there."""


@pytest.fixture
def triton_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: Any = ModuleType("triton.errors")
    errors.TritonError = TritonError
    monkeypatch.setitem(sys.modules, "triton.errors", errors)


FAILURES = [RuntimeError, TritonError, PermissionError, subprocess.SubprocessError]


@pytest.mark.usefixtures("triton_stand_in")
@pytest.mark.parametrize("error_class", [*FAILURES, torch.OutOfMemoryError])
def test_what_cannot_be_recorded_is_run_as_before(
    tmp_path: Path, error_class: type[Exception]
) -> None:
    checkpoint = Checkpoint(save_model(make_model("llama"), tmp_path))
    span = load(checkpoint)
    expected_SD = decode(span, [1])

    def record(work: Callable[[], None]) -> Callable[[], None]:
        raise error_class("operation not permitted when stream is capturing")

    span.record_steps(record)
    assert torch.equal(decode(span, [1]), expected_SD)
    assert "not permitted" in span.graphs_failure


@pytest.mark.usefixtures("triton_stand_in")
@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("error_class", FAILURES)
def test_a_variant_of_the_kernel_that_fails_is_done_without(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error_class: type[Exception],
    is_recorded: bool,
) -> None:
    checkpoint = Checkpoint(save_model(make_model("llama"), tmp_path))
    expected_SD = decode(load(checkpoint), [1, 2, 3])
    calls = []

    def attend(*about: Any) -> torch.Tensor:
        rows = about[2].shape[1]
        calls.append(rows)
        if rows == 3 and len([one for one in calls if one == 3]) > 1:  # in the second block
            raise error_class("no such variant")
        return attend_in_turn(*about)

    monkeypatch.setattr(block_module, "find_decode_kernel", lambda *about: attend)
    span = load(checkpoint)
    if is_recorded:
        span.record_steps(Replayer())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(decode(span, [1, 2, 3]), expected_SD)
    assert ("no such variant" in span.graphs_failure) == is_recorded
    assert caplog.text.count("one after the other: no such variant") == 1
    assert calls.count(3) == (3 if is_recorded else 2)  # it is not tried again


def test_want_of_memory_is_no_failure_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(*about: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(block_module, "find_decode_kernel", lambda *about: attend)
    span = load(Checkpoint(save_model(make_model("llama"), tmp_path)))
    caches = open_caches(span, 2)
    for _ in range(2):
        with pytest.raises(OutOfDeviceMemory):
            span.step(torch.zeros(2, 48), [Segment(cache, 1) for cache in caches])
    assert span._has_decode_kernel
