"""Decode speed: plain Hugging Face, one span in this process, and chains of real daemons.

    python benchmarks/decode.py [--hops 1 3] [--contexts 128 1024] [--steps 32] [--rounds 3]

All on the same weights, float32, with the same number of threads. Every round measures each way
once, in turn, so that a machine whose speed drifts treats them alike; printed are the median over
the rounds and the least and most. From the chains' own times follows what each hop adds beyond its
compute: (time of a step - time in the kernels of all hops - time in this daemon's head) / hops.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.report import describe_machine, spread, write_results
from kernels.checkpoint import Checkpoint
from kernels.head import load_ends
from kernels.kv_cache import CacheArena
from kernels.model_store import find_model
from kernels.span import Segment, load_span
from petalctl.client import Client
from petalctl.private_swarm import PrivateSwarm

DEVICE = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one way.

    Attributes:
        steps_per_s: decode steps, from token to token.
        overhead_ms: per hop, beyond compute; none where there is no hop.
    """

    steps_per_s: float
    overhead_ms: float | None = None


Way = Callable[[int], Sample]
"""Measures decode after a context of so many tokens."""


def make_prompt(tokens: int, vocabulary: int) -> list[int]:
    rng = random.Random(tokens)
    return [rng.randrange(100, vocabulary - 100) for _ in range(tokens)]


def make_hugging_face(folder: Path, steps: int) -> Way:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    class Stopwatch:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def measure(context: int) -> Sample:
        ids = torch.tensor([make_prompt(context, model.config.vocab_size)])
        watch = Stopwatch()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps + 1,
                min_new_tokens=steps + 1,
                streamer=watch,
            )
        times = watch.times[1:]  # the first call gives the prompt back
        return Sample(steps_per_s=(len(times) - 1) / (times[-1] - times[0]))

    return measure


def make_in_process(folder: Path, steps: int, contexts: list[int]) -> Way:
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    span = load_span(checkpoint, 0, config.num_blocks, dtype=torch.float32, device=DEVICE)
    ends = load_ends(checkpoint, dtype=torch.float32, device=DEVICE)
    room = max(contexts) + steps + 2
    arena = CacheArena(
        config,
        blocks=config.num_blocks,
        capacity_tokens=2 * room,
        dtype=torch.float32,
        device=DEVICE,
    )

    def measure(context: int) -> Sample:
        cache = arena.open(room)
        ids = torch.tensor(make_prompt(context, config.vocab_size))
        hidden_SD = span.step(ends.embedding.embed(ids), [Segment(cache, context)])
        token = int(ends.head.logits(hidden_SD[-1:])[0].argmax())
        started_at = time.perf_counter()
        for _ in range(steps):
            hidden_SD = span.step(ends.embedding.embed(torch.tensor([token])), [Segment(cache, 1)])
            token = int(ends.head.logits(hidden_SD)[0].argmax())
        seconds = time.perf_counter() - started_at
        cache.close()
        return Sample(steps_per_s=steps / seconds)

    return measure


def make_chain(client: Client, hops: int, steps: int, vocabulary: int, head_s: float) -> Way:
    def measure(context: int) -> Sample:
        generation = client.generate(
            prompt_tokens=make_prompt(context, vocabulary), max_new_tokens=steps + 1
        )
        result = generation.result()
        if len(result.tokens) != steps + 1:
            raise SystemExit(f"the model ended after {len(result.tokens)} tokens; try other steps")
        timings = result.timings
        step_s = 1 / timings.steps_per_s
        compute_s = sum(timings.hop_compute_s) / steps
        overhead_s = (step_s - compute_s - head_s) / hops
        return Sample(steps_per_s=timings.steps_per_s, overhead_ms=overhead_s * 1e3)

    return measure


def measure_head_s(folder: Path) -> float:
    """Seconds for head, sampling and embedding of one token, which every way pays."""
    checkpoint = Checkpoint(folder)
    ends = load_ends(checkpoint, dtype=torch.float32, device=DEVICE)
    hidden_SD = torch.randn(1, checkpoint.config.hidden_size)
    times = []
    for _ in range(30):
        started_at = time.perf_counter()
        token = int(ends.head.logits(hidden_SD)[0].argmax())
        ends.embedding.embed(torch.tensor([token]))
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[5:])


@contextlib.contextmanager
def open_ways(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Way]]:
    config = Checkpoint(folder).config
    head_s = measure_head_s(folder)
    ways: dict[str, Way] = {
        "Hugging Face": make_hugging_face(folder, args.steps),
        "in process": make_in_process(folder, args.steps, args.contexts),
    }
    with contextlib.ExitStack() as stack:
        for hops in args.hops:
            borders = [round(config.num_blocks * i / hops) for i in range(hops + 1)]
            swarm = stack.enter_context(
                PrivateSwarm(
                    args.model,
                    spans=list(itertools.pairwise(borders)),
                    threads=args.threads,
                    dtype="float32",
                )
            )
            client = stack.enter_context(swarm.client())
            name = f"{hops} hop" + "s" * (hops > 1)
            ways[name] = make_chain(client, hops, args.steps, config.vocab_size, head_s)
        yield ways


def print_table(context: int, samples: dict[str, list[Sample]]) -> None:
    base = [sample.steps_per_s for sample in samples["Hugging Face"]]
    print(f"\nafter {context} tokens of context")
    print(f"{'':14} {'steps/s':>24} {'ratio to Hugging Face':>24} {'ms added per hop':>24}")
    for name, runs in samples.items():
        speeds = [run.steps_per_s for run in runs]
        ratios = [speed / one for speed, one in zip(speeds, base, strict=True)]
        added = [run.overhead_ms for run in runs if run.overhead_ms is not None]
        print(
            f"{name:14} {spread(speeds):>24} {spread(ratios):>24} "
            f"{spread(added) if added else '':>24}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--hops", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 1024])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    machine = describe_machine()
    torch.set_num_threads(args.threads)
    print(f"{machine}; {args.threads} thread(s), {args.steps} steps, n = {args.rounds}")
    folder = find_model(args.model).path
    results: dict[int, dict[str, list[Sample]]] = {}
    with open_ways(args, folder) as ways:
        for context in args.contexts:
            results[context] = {name: [] for name in ways}
            for round_number in range(args.rounds + 1):  # the first one warms up
                for name, measure in ways.items():
                    sample = measure(context)
                    if round_number:
                        results[context][name].append(sample)
            print_table(context, results[context])
    plain = {
        context: {name: [vars(run) for run in runs] for name, runs in samples.items()}
        for context, samples in results.items()
    }
    write_results("decode", machine, args, plain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
