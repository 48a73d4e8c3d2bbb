"""How fast the hosted span and the codecs are, measured on the device itself."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from kernels.codecs.registry import find_codec
from kernels.kv_cache import CacheArena, SequenceCache
from kernels.span import Segment, Span
from petald.codec_choice import AUTO_CODECS, TYPICAL_COSTS, CodecCost

WARM_UP_STEPS = 2
MEASURED_STEPS = 5
FORWARD_TOKENS = 128
MEASURED_FORWARDS = 3

CODEC_SHAPES = ((1, 4096), (64, 4096))
"""Rows and width of the two messages from which a codec's cost is worked out: a decode step's, and
one that is long enough to show what each value takes."""
CODEC_ROUNDS = 5
MOST_TIMES_TYPICAL = 5.0
"""A slower machine than this would hardly serve; one that is busy at the start is not for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpeed:
    """How fast a device is with one block of a model.

    Attributes:
        step_s: of a decode step of one session.
        token_s: of each token of a long forward pass.
    """

    step_s: float
    token_s: float


def measure_speed(span: Span, arena: CacheArena) -> BlockSpeed:
    """Measures a span's blocks: medians of some steps of one session, over all its blocks.

    Runs on the calling thread, which must own span and arena.
    """
    blocks = span.end - span.start
    tokens = max(1, min(FORWARD_TOKENS, arena.free_tokens // 2))
    cache = arena.open(min(arena.free_tokens, max(tokens, WARM_UP_STEPS + MEASURED_STEPS)))
    try:
        steps = WARM_UP_STEPS + MEASURED_STEPS
        step_s = [_time_step_s(span, cache, 1) for _ in range(min(steps, cache.max_tokens))]
        forward_s = []
        for _ in range(1 + MEASURED_FORWARDS):
            cache.truncate(0)
            forward_s.append(_time_step_s(span, cache, tokens))
    finally:
        cache.close()
    return BlockSpeed(
        step_s=statistics.median(step_s[WARM_UP_STEPS:] or step_s) / blocks,
        token_s=statistics.median(forward_s[1:]) / blocks / tokens,
    )


def _time_step_s(span: Span, cache: SequenceCache, tokens: int) -> float:
    shape = tokens, span.config.hidden_size
    hidden_SD = torch.zeros(shape, dtype=span.dtype, device=span.device)
    started_at = time.perf_counter()
    span.step(hidden_SD, [Segment(cache, tokens)])
    if span.device.type == "cuda":
        torch.cuda.synchronize(span.device)
    return time.perf_counter() - started_at


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
