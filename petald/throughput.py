"""How fast the hosted span and the codecs are, measured on the device itself."""

from __future__ import annotations

import statistics
import time

import torch

from kernels.codecs.registry import find_codec
from kernels.kv_cache import CacheArena
from kernels.span import Segment, Span
from petald.codec_choice import AUTO_CODECS, TYPICAL_COSTS, CodecCost

WARM_UP_STEPS = 2
MEASURED_STEPS = 5

CODEC_SHAPES = ((1, 4096), (64, 4096))
"""Rows and width of the two messages from which a codec's cost is worked out: a decode step's, and
one that is long enough to show what each value takes."""
CODEC_ROUNDS = 5
MOST_TIMES_TYPICAL = 5.0
"""A slower machine than this would hardly serve; one that is busy at the start is not for ever."""


def measure_step_ms(span: Span, arena: CacheArena) -> float:
    """Milliseconds of a decode step of one session through the whole span, the median of some.

    Runs on the calling thread, which must own span and arena.
    """
    cache = arena.open(WARM_UP_STEPS + MEASURED_STEPS)
    hidden_SD = torch.zeros(1, span.config.hidden_size, dtype=span.dtype, device=span.device)
    times_ms = []
    try:
        for _ in range(WARM_UP_STEPS + MEASURED_STEPS):
            started_at = time.perf_counter()
            span.step(hidden_SD, [Segment(cache, 1)])
            if span.device.type == "cuda":
                torch.cuda.synchronize(span.device)
            times_ms.append((time.perf_counter() - started_at) * 1e3)
    finally:
        cache.close()
    return statistics.median(times_ms[WARM_UP_STEPS:])


def measure_codecs(device: torch.device) -> dict[str, CodecCost]:
    """What the codecs that may be chosen without being asked for cost on a device.

    Takes some milliseconds, on the calling thread.
    """
    generator = torch.Generator().manual_seed(0)
    messages = [torch.randn(shape, generator=generator).to(device) for shape in CODEC_SHAPES]
    costs = {}
    for name in AUTO_CODECS:
        short_s, long_s = (_round_trip_s(name, rows_SD) for rows_SD in messages)
        short, long = (rows_SD.numel() for rows_SD in messages)
        value_s = max(0.0, (long_s - short_s) / (long - short))
        costs[name] = _bounded(CodecCost(max(0.0, short_s - short * value_s), value_s), name)
    return costs


def _bounded(measured: CodecCost, name: str) -> CodecCost:
    """What was measured, unless the machine was so busy with other things that it tells nothing."""
    typical = TYPICAL_COSTS[name]
    return CodecCost(
        min(measured.fixed_s, MOST_TIMES_TYPICAL * typical.fixed_s),
        min(measured.value_s, MOST_TIMES_TYPICAL * typical.value_s),
    )


def _round_trip_s(name: str, rows_SD: torch.Tensor) -> float:
    """Encoding and decoding a message, the least of some."""
    codec = find_codec(name)
    times_s = []
    for _ in range(CODEC_ROUNDS):
        started_at = time.perf_counter()
        data_SR = codec.encode(rows_SD)
        codec.decode(data_SR, rows_SD.shape[1], rows_SD.dtype).to(rows_SD.device)
        times_s.append(time.perf_counter() - started_at)
    return min(times_s)
