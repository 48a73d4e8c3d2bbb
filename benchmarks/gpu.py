"""A GPU's speed: blocks of Llama 8B's shape, recorded steps against others, and Hugging Face's.

    python benchmarks/gpu.py [--blocks 2] [--batches 1 4 16] [--contexts 512 4096] [--quick]

Decode steps and prefill tokens in a second through some blocks, without embedding and head, with
the weights in each format, each step of a batch of sessions that have the same context. Where steps
can be recorded they are measured both ways; and of the first format also with sessions attended to
one after the other ("in turn"), as it is where there is no Triton. Hugging Face's layers run the
same batch with torch's own attention and a cache that grows. Every round measures each way once, in
turn; ratios are of pairs of one round. Then attention's kernels alone, the int8 codec's kernels
against its plain operations, and what the first step of each number of sessions costs, in which its
graphs are recorded.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.report import describe_machine, spread, write_results
from benchmarks.weights_measures import MAKINGS, load
from benchmarks.weights_model import LARGE_SHAPE, write_large_blocks
from kernels.attention import Attention
from kernels.codecs import int8
from kernels.codecs.registry import find_codec
from kernels.decode_kernel import DecodeKernel, find_decode_kernel
from kernels.kv_cache import CacheArena
from kernels.span import Segment, Span
from kernels.step_graphs import CudaRecorder

FORMATS = ("bfloat16", "int8", "nf4", "int4")
BASE = "Hugging Face"
ROWS = (1, 64, 2048)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one way.

    Attributes:
        step_ms: of a decode step through one block, on average.
        prefill_ktokens_per_s: thousands of tokens, through one block.
    """

    step_ms: float
    prefill_ktokens_per_s: float


Way = Callable[[int, int], Sample]
"""Prefills a batch of so many sequences with so many tokens, and decodes."""


class Clock:
    """Seconds, after all that the device was given is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def set_kernel(span: Span, kernel: DecodeKernel | None) -> None:
    for block in span._blocks:
        block._attention._kernel = kernel
    span._has_decode_kernel = kernel is not None


def make_span_way(
    span: Span,
    arena: CacheArena,
    graphs: Any,
    kernel: DecodeKernel | None,
    args: argparse.Namespace,
    clock: Clock,
) -> Way:
    blocks = span.end - span.start
    all_rows_SD = torch.randn(max(args.contexts), span.config.hidden_size)
    all_rows_SD = all_rows_SD.to(span.device, span.dtype)

    def measure(batch: int, context: int) -> Sample:
        span._graphs = graphs  # all ways share one span: there is no room for two everywhere
        set_kernel(span, kernel)
        rows_SD = all_rows_SD[:context]
        caches = [arena.open(context + args.steps) for _ in range(batch)]
        try:
            began_at = clock.now_s()
            for cache in caches:  # as a server does, which has prompts one after the other
                span.step(rows_SD, [Segment(cache, context)])
            prefilled_at = clock.now_s()
            segments = [Segment(cache, 1) for cache in caches]
            for _ in range(args.steps):
                span.step(rows_SD[:batch], segments)
            ended_at = clock.now_s()
        finally:
            for cache in caches:
                cache.close()
        return Sample(
            step_ms=(ended_at - prefilled_at) / args.steps / blocks * 1e3,
            prefill_ktokens_per_s=batch * context * blocks / (prefilled_at - began_at) / 1e3,
        )

    return measure


def make_hugging_face(args: argparse.Namespace, device: torch.device, clock: Clock) -> Way:
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    shape = {name: value for name, value in LARGE_SHAPE.items() if name != "model_type"}
    config = LlamaConfig(**shape, num_hidden_layers=args.blocks)
    config._attn_implementation = "sdpa"
    with device:
        layers = [LlamaDecoderLayer(config, number) for number in range(args.blocks)]
        rotary = LlamaRotaryEmbedding(config)
    layers = [layer.to(torch.bfloat16).eval() for layer in layers]

    def step(hidden_BSD: torch.Tensor, at: int, cache: Any) -> None:
        positions = torch.arange(at, at + hidden_BSD.shape[1], device=device)[None]
        embeddings = rotary(hidden_BSD, positions)
        for layer in layers:
            hidden_BSD = layer(
                hidden_BSD,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=embeddings,
            )
            if isinstance(hidden_BSD, tuple):
                hidden_BSD = hidden_BSD[0]

    @torch.inference_mode()
    def measure(batch: int, context: int) -> Sample:
        hidden_BSD = torch.randn(batch, context, config.hidden_size, device=device)
        hidden_BSD = hidden_BSD.to(torch.bfloat16)
        cache = DynamicCache()
        began_at = clock.now_s()
        step(hidden_BSD, 0, cache)
        prefilled_at = clock.now_s()
        for number in range(args.steps):
            step(hidden_BSD[:, :1], context + number, cache)
        ended_at = clock.now_s()
        return Sample(
            step_ms=(ended_at - prefilled_at) / args.steps / args.blocks * 1e3,
            prefill_ktokens_per_s=batch * context * args.blocks / (prefilled_at - began_at) / 1e3,
        )

    return measure


def make_ways(
    folder: Path, args: argparse.Namespace, device: torch.device, clock: Clock
) -> dict[str, Way]:
    ways: dict[str, Way] = {BASE: make_hugging_face(args, device, clock)}
    for name in args.formats:
        began_at = clock.now_s()
        span = load(folder, MAKINGS[name], device)
        took_s = clock.now_s() - began_at
        parameters = sum(
            linear.num_parameters
            for number in range(args.blocks)
            for linear in span.block(number).linears
        )
        taken = span.weight_bytes / parameters
        print(f"{name}: loaded in {took_s:.1f} s; {taken:.3f} bytes a weight")
        arena = CacheArena(
            span.config,
            blocks=args.blocks,
            capacity_tokens=2 * max(args.batches) * (max(args.contexts) + args.steps + 64),
            dtype=span.dtype,
            device=device,
        )
        kernel = span.block(0)._attention._kernel
        kinds = {name: kernel}
        if kernel is not None and name == args.formats[0]:
            kinds[f"{name}, in turn"] = None
        for title, used in kinds.items():
            ways[title] = make_span_way(span, arena, None, used, args, clock)
            set_kernel(span, used)
            if device.type == "cuda" and span.record_steps(CudaRecorder(device)):
                graphs = span._graphs
                print(f"{title}:")
                tell_recording(span, arena, args, clock)
                if span.graphs_failure:
                    print(f"  cannot be recorded: {span.graphs_failure[:200]}")
                    continue
                ways[f"{title}, recorded"] = make_span_way(span, arena, graphs, used, args, clock)
    return ways


def tell_recording(span: Span, arena: CacheArena, args: argparse.Namespace, clock: Clock) -> None:
    """What the first step of each number of sessions costs."""
    for batch in args.batches:
        caches = [arena.open(64) for _ in range(batch)]
        rows_SD = torch.zeros(batch, span.config.hidden_size, dtype=span.dtype, device=span.device)
        before = torch.cuda.memory_reserved()
        times = []
        for _ in range(3):
            began_at = clock.now_s()
            span.step(rows_SD, [Segment(cache, 1) for cache in caches])
            times.append((clock.now_s() - began_at) * 1e3)
        for cache in caches:
            cache.close()
        kept = (torch.cuda.memory_reserved() - before) / 2**20
        print(
            f"  recording {batch} row(s): first step {times[0]:.1f} ms, then {times[-1]:.2f} ms; "
            f"{kept:.0f} MiB more"
        )


def compare(ways: dict[str, Way], batch: int, context: int, rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first one warms up
        for name, way in ways.items():
            sample = way(batch, context)
            if turn:
                samples[name].append(sample)
    print(f"\n{batch} session(s) after {context} tokens; of one block")
    heads = ("ms/step", f"to {BASE}", "prefill ktokens/s", f"to {BASE}")
    print(f"{'':27}" + "".join(f"{head:>23}" for head in heads))
    base = samples[BASE]
    for name, found in samples.items():
        steps = [b.step_ms / s.step_ms for s, b in zip(found, base, strict=True)]
        prefill = [
            s.prefill_ktokens_per_s / b.prefill_ktokens_per_s
            for s, b in zip(found, base, strict=True)
        ]
        cells = (
            spread([sample.step_ms for sample in found]),
            spread(steps),
            spread([sample.prefill_ktokens_per_s for sample in found]),
            spread(prefill),
        )
        print(f"{name:27}" + "".join(f"{cell:>23}" for cell in cells))
    return samples


def compare_attention(args: argparse.Namespace, device: torch.device, clock: Clock) -> Any:
    """The kernels of decode attention, replayed, against torch's own for each sequence in turn."""
    heads, kv_heads = LARGE_SHAPE["num_attention_heads"], LARGE_SHAPE["num_key_value_heads"]
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    kernel = find_decode_kernel(device, torch.bfloat16, heads, kv_heads, 128)
    if kernel is None:
        return {}
    plain = Attention()
    print("\nattention of one block alone: microseconds")
    print(f"{'sessions':>8}{'tokens':>8}{'kernels':>24}{'GB/s':>8}{'torch, in turn':>24}")
    results: dict[str, Any] = {}

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    for batch, context in itertools.product(args.batches, args.contexts):
        room = context + 64
        cache_KTH = draw(kv_heads, batch * room, 128), draw(kv_heads, batch * room, 128)
        projected = draw(batch, heads, 128), draw(batch, kv_heads, 128), draw(batch, kv_heads, 128)
        offsets = [room * row for row in range(batch)]
        places_2S = torch.tensor([offsets, [context] * batch], device=device)

        def together() -> None:
            for _ in range(20):
                kernel(projected, cache_KTH, places_2S, None, 0)  # noqa: B023

        def in_turn() -> None:
            for row, offset in enumerate(offsets):  # noqa: B023
                seen = slice(offset, offset + context + 1)  # noqa: B023
                for part_KTH, made in zip(cache_KTH, projected[1:], strict=True):  # noqa: B023
                    part_KTH[:, offset + context] = made[row]  # noqa: B023
                keys_KTH, values_KTH = (part_KTH[:, seen] for part_KTH in cache_KTH)  # noqa: B023
                plain.one(projected[0][row : row + 1], keys_KTH, values_KTH)  # noqa: B023

        replay = CudaRecorder(device)(together)
        times: list[list[float]] = [[], []]
        for turn in range(args.rounds + 1):
            for way, runs, of_way in ((replay, 20, times[0]), (in_turn, 1, times[1])):
                began_at = clock.now_s()
                way()
                if turn:
                    of_way.append((clock.now_s() - began_at) / runs * 1e6)
        rate = 2 * batch * kv_heads * context * 128 * 2 / statistics.median(times[0]) / 1e3
        cells = f"{spread(times[0]):>24}{rate:8.0f}{spread(times[1]):>24}"
        print(f"{batch:8}{context:8}{cells}")
        results[f"{batch} of {context}"] = times
    return results


def compare_codec(args: argparse.Namespace, device: torch.device, clock: Clock) -> dict[str, Any]:
    """The int8 codec's kernels against its plain operations; the copy to the CPU included."""
    codec = find_codec("int8")
    find_fused = int8.find_fused
    print("\nint8 codec, bfloat16, hidden size 4096: microseconds, kernels against plain")
    heads = ("encode", "plain", "ratio", "decode", "plain", "ratio")
    print(f"{'rows':6}" + "".join(f"{head:>24}" for head in heads))
    results: dict[str, Any] = {}
    for count in ROWS:
        rows_SD = torch.randn(count, 4096, device=device, dtype=torch.bfloat16)
        data_SR = codec.encode(rows_SD).to(device)
        times: dict[str, list[float]] = {}
        for turn in range(args.rounds + 1):
            for way in ("kernels", "plain"):
                if way == "plain":
                    int8.find_fused = lambda device, dtype: None  # type: ignore[assignment]
                for what, function in (
                    ("encode", lambda: codec.encode(rows_SD)),  # noqa: B023
                    ("decode", lambda: codec.decode(data_SR, 4096, torch.bfloat16)),  # noqa: B023
                ):
                    function()
                    began_at = clock.now_s()
                    for _ in range(20):
                        function()
                    took_us = (clock.now_s() - began_at) / 20 * 1e6
                    if turn:
                        times.setdefault(f"{what} {way}", []).append(took_us)
                int8.find_fused = find_fused
        cells = []
        for what in ("encode", "decode"):
            fused, plain = times[f"{what} kernels"], times[f"{what} plain"]
            ratios = [p / f for f, p in zip(fused, plain, strict=True)]
            cells += [spread(fused), spread(plain), spread(ratios)]
        print(f"{count:<6}" + "".join(f"{cell:>24}" for cell in cells))
        results[str(count)] = {name: statistics.median(found) for name, found in times.items()}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: its figures say nothing"
    )
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.contexts, args.steps, args.rounds, args.batches = 1, [16], 2, 2, [1, 2]
    device = torch.device(args.device)
    clock = Clock(device)
    machine = describe_machine()
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    print(f"{machine}; n = {args.rounds}, {args.steps} steps, {args.blocks} block(s)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_large_blocks(Path(temporary), args.blocks)
        ways = make_ways(folder, args, device, clock)
    results: dict[str, Any] = {}
    for context, batch in itertools.product(args.contexts, args.batches):
        samples = compare(ways, batch, context, args.rounds)
        results[f"{batch} of {context}"] = {
            name: [vars(sample) for sample in found] for name, found in samples.items()
        }
    if device.type == "cuda":
        results["attention"] = compare_attention(args, device, clock)
        results["codec"] = compare_codec(args, device, clock)
    write_results("gpu", machine, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
