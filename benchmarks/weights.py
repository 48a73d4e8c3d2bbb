"""Weight formats: memory, decode and prefill speed, and what they cost in perplexity.

    python benchmarks/weights.py [--blocks 3] [--rounds 7] [--tokens 16384] [--quick]

Measured on a small real model, and on a few random blocks of Llama 8B's shape, which no cache
holds. Every round measures each format once, in turn, so that a machine whose speed drifts treats
them alike; ratios are of pairs of one round. Memory is that of a process of its own for each. The
tables of products are what `FEW_ROWS` in `kernels.quant`, and the dense layouts, are chosen by.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.report import describe_machine, spread, write_results
from benchmarks.weights_measures import (
    MAKINGS,
    SpanSpeed,
    load,
    load_model_ends,
    measure_memory,
    measure_perplexity,
    measure_products,
    read_text_ids,
)
from benchmarks.weights_model import write_large_blocks
from kernels.model_store import find_model

BASE = "bfloat16"


def compare_memory(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    found = {name: measure_memory(folder, name, args.device, args.threads) for name in args.formats}
    print(f"{'':10} {'bytes/parameter':>16} {'as told':>8} {'peak':>6} {'load s':>7} {'GB/s':>6}")
    for name, told in found.items():
        parameters = told["parameters"]
        print(
            f"{name:10} {told['process_bytes'] / parameters:16.3f} "
            f"{told['weight_bytes'] / parameters:8.3f} {told['peak_bytes'] / parameters:6.2f} "
            f"{told['load_s']:7.2f} {2 * parameters / told['load_s'] / 1e9:6.2f}"
        )
    print("GB/s: of the checkpoint in 16 bits")
    return found


def compare_speed(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    ways = {
        name: SpanSpeed(load(folder, MAKINGS[name], device), args.context) for name in args.formats
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):  # the first one warms up
        for name, way in ways.items():
            sample = way.measure(args.steps if turn else 2)
            if turn:
                samples[name].append(sample)
    for key in ("steps_per_s", "prefill_tokens_per_s"):
        print(f"{key:26} {'':24} {'ratio to ' + BASE:>24}")
        base = [sample[key] for sample in samples[BASE]]
        for name, found in samples.items():
            values = [sample[key] for sample in found]
            ratios = [value / one for value, one in zip(values, base, strict=True)]
            print(f"{name:26} {spread(values):>24} {spread(ratios):>24}")
    return samples


def compare_perplexity(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    ids = read_text_ids(folder, args.tokens)
    found = {}
    for name in args.formats:
        making = MAKINGS[name]
        span = load(folder, making, torch.device("cpu"))
        found[name] = measure_perplexity(span, load_model_ends(folder, making), ids)
    print(f"perplexity over {len(ids)} tokens")
    for name, value in found.items():
        print(f"{name:10} {value:8.4f} {100 * (value / found[BASE] - 1):+7.2f} %")
    return found


def compare_products(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    found = {rows: measure_products(rows, args.width, args.repeats) for rows in args.rows}
    print(f"milliseconds of a product with {args.width} x {args.width}, by rows")
    print(f"{'':22}" + "".join(f"{rows:8}" for rows in found))
    for way in next(iter(found.values())):
        print(f"{way:22}" + "".join(f"{found[rows][way]:8.2f}" for rows in found))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--formats", nargs="*", default=list(MAKINGS), choices=list(MAKINGS))
    parser.add_argument("--blocks", type=int, default=3, help="of Llama 8B's shape")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16384, help="of the text for perplexity")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--parts",
        nargs="*",
        default=["memory", "speed", "model", "perplexity", "products"],
        help="speed: of the large blocks; model: of the real one",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: its figures say nothing"
    )
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.rounds, args.steps, args.tokens = 1, 2, 4, 600
        args.rows, args.repeats, args.width = [1, 64], 2, 1024
    if BASE not in args.formats:
        args.formats = [BASE, *args.formats]
    machine = describe_machine()
    torch.set_num_threads(args.threads)
    print(f"{machine}; {args.threads} thread(s), n = {args.rounds}")
    results: dict[str, Any] = {}
    folder = find_model(args.model).path
    with tempfile.TemporaryDirectory() as temporary:
        if {"memory", "speed"} & set(args.parts):
            large = write_large_blocks(Path(temporary), args.blocks)
        if "memory" in args.parts:
            print(f"\n{args.blocks} block(s) of Llama 8B's shape: memory of the process")
            results["memory"] = compare_memory(large, args)
        if "speed" in args.parts:
            print(f"\n{args.blocks} block(s) of Llama 8B's shape")
            results["large_speed"] = compare_speed(large, args)
    if "model" in args.parts:
        print(f"\n{args.model}")
        results["model_speed"] = compare_speed(folder, args)
    if "perplexity" in args.parts:
        print()
        results["perplexity"] = compare_perplexity(folder, args)
    if "products" in args.parts:
        print()
        results["products"] = compare_products(args)
    write_results("weights", machine, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
