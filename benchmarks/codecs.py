"""Codecs: how many bytes they take, how quick they are, and what they do to a model.

    python benchmarks/codecs.py [--only bytes speed perplexity gradients] [--windows 40]

Four tables. Bytes of a token's hidden state, as a part of bfloat16's. Speed of encoding and
decoding 2,048 rows, in GB of hidden states a second, and of one row, in microseconds. The
perplexity of SmolLM2 on Python's help texts (``pydoc_data.topics``) in windows of 512 tokens, where
every link of a chain of 2 or of 5 hops uses the codec, against none: 3 or 6 links, from the client
to the first hop, from hop to hop, and from the last hop to the client. What is measured without the
last link is shown too, since in generation it carries one row of a whole prefill. And the error of
gradients, after one link, and at the client after all links of the longest chain.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.codecs_quality import LocalModel, measure_gradients, measure_perplexity
from benchmarks.report import describe_machine, spread, write_results
from kernels.codecs.registry import CODEC_NAMES, find_codec

TABLES = ("bytes", "speed", "perplexity", "gradients")
WIDTHS = (576, 4096, 8192)
SPEED_WIDTH = 4096
SPEED_ROWS = 2048


def show_bytes() -> dict[str, Any]:
    print("\nbytes of a token's hidden state (part of bfloat16's)")
    print(f"{'':10}" + "".join(f"{f'hidden size {width}':>24}" for width in WIDTHS))
    results: dict[str, Any] = {}
    for name in CODEC_NAMES:
        codec = find_codec(name)
        sizes = {width: codec.row_bytes(width, torch.float32) for width in WIDTHS}
        cells = (f"{size:,} ({size / 2 / width:.3f})" for width, size in sizes.items())
        print(f"{name:10}" + "".join(f"{cell:>24}" for cell in cells))
        results[name] = sizes
    return results


def time_runs(function: Callable[[], object], runs: int) -> list[float]:
    times = []
    for number in range(runs + 2):
        started_at = time.perf_counter()
        function()
        if number >= 2:
            times.append(time.perf_counter() - started_at)
    return times


def show_speed(runs: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        print(f"\nspeed for {dtype}, hidden size {SPEED_WIDTH}")
        print(
            f"{'':10}" + "".join(f"{head:>26}" for head in ("encode GB/s", "decode GB/s")), end=""
        )
        print("".join(f"{head:>26}" for head in ("encode a row, us", "decode a row, us")))
        many_SD = torch.randn(SPEED_ROWS, SPEED_WIDTH).to(dtype)
        one_SD = many_SD[:1].clone()
        gigabytes = many_SD.numel() * dtype.itemsize / 1e9
        for name in CODEC_NAMES:
            codec = find_codec(name)
            cells: list[list[float]] = []
            for rows_SD, count in ((many_SD, runs), (one_SD, 50 * runs)):
                data_SR = codec.encode(rows_SD)

                def encode(rows_SD: torch.Tensor = rows_SD, codec: Any = codec) -> None:
                    codec.encode(rows_SD)

                def decode(data_SR: torch.Tensor = data_SR, codec: Any = codec) -> None:
                    codec.decode(data_SR, SPEED_WIDTH, dtype)  # noqa: B023

                for function in (encode, decode):
                    times = time_runs(function, count)
                    is_many = rows_SD is many_SD
                    cells.append([gigabytes / t if is_many else t * 1e6 for t in times])
            if name == "raw" or (name == str(dtype).removeprefix("torch.")):
                note = "   shares the memory, nothing is copied"
                print(f"{name:10}{note}")
            else:
                print(f"{name:10}" + "".join(f"{spread(cell):>26}" for cell in cells))
            medians = [statistics.median(cell) for cell in cells]
            results.setdefault(str(dtype), {})[name] = medians
    return results


def show_perplexity(model: LocalModel, args: argparse.Namespace) -> dict[str, Any]:
    lossy = [name for name in args.codecs if find_codec(name).is_lossy]
    tokens = args.windows * args.window_tokens
    print(f"\nperplexity over {tokens:,} tokens, n = {args.windows} windows; change in %, with the")
    print("standard error of the windows' mean, each compared with itself without a codec")
    results = measure_perplexity(
        model, lossy, args.hops, windows=args.windows, window_tokens=args.window_tokens
    )
    print(f"without a codec: {results['perplexity']:.3f}")
    ways = [f"{hops} hops{rest}" for hops in args.hops for rest in ("", ", not the last link")]
    print(f"{'':10}" + "".join(f"{way:>30}" for way in ways))
    for name in lossy:
        changes = [results["changes"][name][way] for way in ways]
        cells = (f"{c['percent']:+.3f} ({c['standard_error']:.3f})" for c in changes)
        print(f"{name:10}" + "".join(f"{cell:>30}" for cell in cells))
    return results


def show_gradients(model: LocalModel, args: argparse.Namespace) -> dict[str, Any]:
    hops = max(args.hops)
    print(f"\nrelative error of gradients, in %, of a batch of 4 windows of {args.window_tokens}")
    results = measure_gradients(model, args.codecs, hops, tokens=args.window_tokens)
    heads = ("one link", f"at the client, {hops} hops")
    print(f"{'':10}" + "".join(f"{head:>30}" for head in heads))
    for name, (one, whole) in results.items():
        print(f"{name:10}{100 * one:>30.4f}{100 * whole:>30.4f}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--codecs", nargs="*", choices=CODEC_NAMES, default=list(CODEC_NAMES))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--hops", type=int, nargs="*", default=[2, 5])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = describe_machine()
    print(machine)
    results: dict[str, Any] = {}
    if "bytes" in args.only:
        results["bytes"] = show_bytes()
    if "speed" in args.only:
        results["speed"] = show_speed(args.runs)
    if {"perplexity", "gradients"} & set(args.only):
        model = LocalModel(args.model)
        if "perplexity" in args.only:
            results["perplexity"] = show_perplexity(model, args)
        if "gradients" in args.only:
            results["gradients"] = show_gradients(model, args)
    write_results("codecs", machine, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
