"""What `benchmarks/weights.py` measures of a span in one weight format."""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.checkpoint import Checkpoint
from kernels.head import Ends, load_ends
from kernels.kv_cache import CacheArena
from kernels.quant import int4, int8, int8_groups, nf4_matrix
from kernels.quant.formats import quantise_parts
from kernels.quant.int8_groups import Int8GroupWeights
from kernels.quant.matrix import QuantisedMatrix, multiply_by_tiles
from kernels.span import Segment, Span, load_span
from kernels.tokenizer import Tokenizer

GROUPS = "int8 groups"
"""What GGUF's Q8_0 is kept as; no format that a server can choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """A weight format with the dtype that steps are computed in."""

    quant: str
    dtype: torch.dtype


MAKINGS = {
    "bfloat16": Making(quant="none", dtype=torch.bfloat16),
    "float32": Making(quant="none", dtype=torch.float32),
    "int8": Making(quant="int8", dtype=torch.bfloat16),
    "nf4": Making(quant="nf4", dtype=torch.bfloat16),
    "int4": Making(quant="int4", dtype=torch.bfloat16),
}


def load(folder: Path, making: Making, device: torch.device) -> Span:
    checkpoint = Checkpoint(folder)
    return load_span(
        checkpoint,
        0,
        checkpoint.config.num_blocks,
        dtype=making.dtype,
        device=device,
        quant=making.quant,
    )


class SpanSpeed:
    """Steps of one span, without embedding and head."""

    def __init__(self, span: Span, context: int) -> None:
        self._span = span
        self._context = context
        self._arena = CacheArena(
            span.config,
            blocks=span.end - span.start,
            capacity_tokens=2 * context + 256,
            dtype=span.dtype,
            device=span.device,
        )
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(context, span.config.hidden_size, generator=generator)
        self._rows = rows.to(span.device, span.dtype)

    def measure(self, steps: int) -> dict[str, float]:
        """Prefill tokens in a second, and decode steps after it."""
        cache = self._arena.open(self._context + steps)
        try:
            started_at = self._now_s()
            self._span.step(self._rows, [Segment(cache, self._context)])
            prefilled_at = self._now_s()
            for row in range(steps):
                at = row % self._context
                self._span.step(self._rows[at : at + 1], [Segment(cache, 1)])
            ended_at = self._now_s()
        finally:
            cache.close()
        return {
            "prefill_tokens_per_s": self._context / (prefilled_at - started_at),
            "steps_per_s": steps / (ended_at - prefilled_at),
        }

    def _now_s(self) -> float:
        if self._span.device.type == "cuda":
            torch.cuda.synchronize(self._span.device)
        return time.perf_counter()


def measure_memory(folder: Path, name: str, device: str, threads: int) -> dict[str, float]:
    """What loading costs, in a process of its own."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks.weights_measures import tell_memory\n"
        "tell_memory(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))\n"
    )
    root = str(Path(__file__).parents[1])
    arguments = [root, str(folder), name, device, str(threads)]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def tell_memory(folder: str, name: str, device: str, threads: int) -> None:
    """Loads all blocks, and prints what the process holds for it, as JSON.

    The mapped checkpoint is not counted: its pages are the file's, and given back when the system
    asks. So it is the anonymous memory, whose peak a thread watches.
    """
    torch.set_num_threads(threads)
    making = MAKINGS[name]
    # Whatever is imported or warmed up at the first use of a format is not its weights'.
    warm_up = torch.randn(64, 64)
    if making.quant != "none":
        matrix = quantise_parts(making.quant, [warm_up], making.dtype).place(making.dtype)
        matrix.multiply(warm_up[:1].to(making.dtype))
        multiply_by_tiles(matrix, warm_up.to(making.dtype))
    before = _anonymous_bytes()
    watch = _PeakWatch()
    started_at = time.perf_counter()
    span = load(Path(folder), making, torch.device(device))
    seconds = time.perf_counter() - started_at
    peak = watch.stop()
    parameters = sum(
        math.prod(shape)
        for block in range(span.start, span.end)
        for shape in _shapes(folder, block)
    )
    print(
        json.dumps(
            {
                "parameters": parameters,
                "process_bytes": _anonymous_bytes() - before,
                "peak_bytes": peak - before,
                "weight_bytes": span.weight_bytes,
                "load_s": seconds,
            }
        )
    )


def _shapes(folder: str, block: int) -> list[tuple[int, ...]]:
    from kernels.weight_names import block_shapes

    return list(block_shapes(Checkpoint(Path(folder)).config, block).values())


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status does not tell RssAnon; this needs Linux")


class _PeakWatch:
    def __init__(self) -> None:
        self._peak = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._is_over.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._is_over.wait(0.002):
            self._peak = max(self._peak, _anonymous_bytes())
        self._peak = max(self._peak, _anonymous_bytes())


def read_text_ids(folder: Path, tokens: int) -> torch.Tensor:
    """Tokens of Python's own help texts."""
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = Tokenizer.load(folder).encode(text[: 8 * tokens])
    return torch.tensor(ids[:tokens])


def measure_perplexity(span: Span, ends: Ends, ids: torch.Tensor, *, window: int = 512) -> float:
    """Of the text, in windows that begin anew."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for part in ids.split(window):
            if len(part) < 2:
                continue
            hidden_SD = span.forward(ends.embedding.embed(part)[None])[0]
            logits_SV = ends.head.logits(hidden_SD[:-1])
            total += float(torch.nn.functional.cross_entropy(logits_SV, part[1:], reduction="sum"))
            count += len(part) - 1
    return math.exp(total / count)


def load_model_ends(folder: Path, making: Making) -> Ends:
    return load_ends(Checkpoint(folder), dtype=making.dtype, device=torch.device("cpu"))


FEW_ROWS = {"int8": int8, "int4": int4, "nf4": nf4_matrix, GROUPS: int8_groups}
"""Where each format keeps its crossing."""


def quantise(name: str, weight: torch.Tensor) -> QuantisedMatrix:
    if name != GROUPS:
        return quantise_parts(name, [weight], torch.bfloat16).place(torch.bfloat16)
    groups = weight.view(len(weight), -1, 32)
    scales = groups.abs().amax(dim=2) / 127
    codes = (groups / scales[..., None]).round().to(torch.int8).view(weight.shape)
    return Int8GroupWeights(codes, scales).place(torch.bfloat16)


def measure_products(rows: int, width: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one product of some rows with a square matrix, in every way there is."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(width, width, generator=generator).mul_(0.02)
    x = torch.randn(rows, width, generator=generator).bfloat16()
    wide = x.float()
    ways: dict[str, Callable[[], torch.Tensor]] = {}
    for name, tensor in (("bfloat16", weight.bfloat16()), ("float32", weight)):
        turned = tensor.t().contiguous()
        rows_in = x if name == "bfloat16" else wide
        ways[f"{name} [out, in]"] = lambda w=tensor, r=rows_in: torch.mm(r, w.t())
        ways[f"{name} [in, out]"] = lambda w=turned, r=rows_in: torch.mm(r, w)
    for name, module in FEW_ROWS.items():
        matrix = quantise(name, weight)
        ways[f"{name} tiles"] = lambda m=matrix: multiply_by_tiles(m, x)

        def by_kernel(modules=(module, int4), matrix=matrix) -> torch.Tensor:  # type: ignore[no-untyped-def]
            kept = [module.FEW_ROWS for module in modules]
            for module in modules:
                module.FEW_ROWS = 1 << 30
            try:
                return matrix.multiply(x)
            finally:
                for module, few in zip(modules, kept, strict=True):
                    module.FEW_ROWS = few

        ways[f"{name} kernel"] = by_kernel
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for turn in range(repeats + 1):  # the first one warms up
            for name, way in ways.items():
                started_at = time.perf_counter()
                way()
                if turn:
                    times[name].append((time.perf_counter() - started_at) * 1e3)
    # The least, for nothing but other processes makes a product slower than it is.
    return {name: min(found) for name, found in times.items()}
