"""How fast the hosted span is, measured on the device itself."""

from __future__ import annotations

import statistics
import time

import torch

from kernels.kv_cache import CacheArena
from kernels.span import Segment, Span

WARM_UP_STEPS = 2
MEASURED_STEPS = 5


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
