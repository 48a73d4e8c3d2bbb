"""Speed of forward and backward passes: one process, and chains of real daemons.

    python benchmarks/training.py [--hops 1 3] [--batches 1 64] [--tokens 128] [--rounds 3]

All on the same weights, in float32, on the same cores: what runs in one process has as many threads
as there are cores, and so has a chain's only daemon; several daemons share the cores, with one
thread each. Printed are tokens a second of forward, and of forward and backward, with the ratio to
*recomputing*, which is the same work in one process: servers keep nothing of a forward pass, so
that a backward pass computes it again. *Hugging Face* and *plain* keep what autograd needs. They
go through a large batch a few sequences at a time, or it would not fit into memory. Every round
measures each way once, in turn; printed are the median over the rounds, and the least and most.
*Busy* is the time in all hops' kernels, by the time that the cores have; where several hops share a
core, each counts the time for itself.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.report import describe_machine, spread, write_results
from kernels.checkpoint import Checkpoint
from kernels.model_store import find_model
from kernels.span import Span, load_span
from kernels.span_pass import PassWork, run_backward, run_forward
from petalctl.passes import TrainingClient
from petalctl.private_swarm import PrivateSwarm
from petalctl.torch import RemoteBlocks

T = TypeVar("T")

DEVICE = torch.device("cpu")
BASE = "recomputing"
AT_ONCE_TOKENS = 1024
"""In one process: 30 blocks keep some 2 GB for so many."""

WARM_UP_SEQUENCES = 4


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one way.

    Attributes:
        forward_s: of a forward pass alone.
        both_s: of a forward and a backward pass.
        busy: kernel time of all hops in both, by wall time and cores; none in one process.
    """

    forward_s: float
    both_s: float
    busy: float | None = None


Forward = Callable[[torch.Tensor], torch.Tensor]
Way = Callable[[torch.Tensor], Sample]
"""Measures passes of a batch ``[B, S, D]``."""


def in_parts(hidden_BSD: torch.Tensor) -> list[torch.Tensor]:
    return list(hidden_BSD.split(max(1, AT_ONCE_TOKENS // hidden_BSD.shape[1])))


def make_autograd(forward: Forward) -> Way:
    """A way whose backward is autograd's own."""

    def measure(hidden_BSD: torch.Tensor) -> Sample:
        parts = in_parts(hidden_BSD)
        started_at = time.perf_counter()
        for part_BSD in parts:
            with torch.no_grad():
                forward(part_BSD)
        forward_s = time.perf_counter() - started_at
        started_at = time.perf_counter()
        for part_BSD in parts:
            leaf_BSD = part_BSD.detach().requires_grad_()
            output_BSD = forward(leaf_BSD)
            output_BSD.backward(torch.ones_like(output_BSD))
        return Sample(forward_s=forward_s, both_s=time.perf_counter() - started_at)

    return measure


def make_hugging_face(folder: Path) -> Way:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    blocks = model.model
    blocks.norm = torch.nn.Identity()

    def forward(hidden_BSD: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = blocks(inputs_embeds=hidden_BSD, use_cache=False).last_hidden_state
        return output

    return make_autograd(forward)


def finish(passing: Generator[None, None, T]) -> T:
    while True:
        try:
            next(passing)
        except StopIteration as end:
            value: T = end.value
            return value


def make_recomputing(span: Span) -> Way:
    """What servers do, in one process."""

    def measure(hidden_BSD: torch.Tensor) -> Sample:
        works = [
            PassWork(hidden_BSD=part_BSD, start=span.start, end=span.end)
            for part_BSD in in_parts(hidden_BSD)
        ]
        started_at = time.perf_counter()
        for work in works:
            finish(run_forward(span, work))
        forward_s = time.perf_counter() - started_at
        started_at = time.perf_counter()
        for work in works:
            output_BSD = finish(run_forward(span, work))
            gradient_BSD = torch.ones_like(output_BSD)
            finish(run_backward(span, work, gradient_BSD, group_blocks=span.end))
        return Sample(forward_s=forward_s, both_s=time.perf_counter() - started_at)

    return measure


def make_remote(blocks: RemoteBlocks, cores: int) -> Way:
    def measure(hidden_BSD: torch.Tensor) -> Sample:
        started_at = time.perf_counter()
        with torch.no_grad():
            blocks(hidden_BSD)
        forward_s = time.perf_counter() - started_at
        leaf_BSD = hidden_BSD.detach().requires_grad_()
        started_at = time.perf_counter()
        output_BSD = blocks(leaf_BSD)
        compute_s = blocks.timings.hop_compute_s
        output_BSD.backward(torch.ones_like(output_BSD))
        both_s = time.perf_counter() - started_at
        compute_s += blocks.timings.hop_compute_s
        return Sample(forward_s=forward_s, both_s=both_s, busy=compute_s / (both_s * cores))

    return measure


@contextlib.contextmanager
def open_ways(args: argparse.Namespace, folder: Path, cores: int) -> Iterator[dict[str, Way]]:
    checkpoint = Checkpoint(folder)
    num_blocks = checkpoint.config.num_blocks
    span = load_span(checkpoint, 0, num_blocks, dtype=torch.float32, device=DEVICE)
    ways: dict[str, Way] = {
        "Hugging Face": make_hugging_face(folder),
        "plain": make_autograd(span.forward),
        BASE: make_recomputing(span),
    }
    with contextlib.ExitStack() as stack:
        for hops in args.hops:
            borders = [round(num_blocks * i / hops) for i in range(hops + 1)]
            swarm = stack.enter_context(
                PrivateSwarm(
                    args.model,
                    spans=list(itertools.pairwise(borders)),
                    threads=max(1, cores // hops),
                    dtype="float32",
                )
            )
            client = stack.enter_context(TrainingClient(swarm.router.socket))
            name = f"{hops} hop" + "s" * (hops > 1)
            ways[name] = make_remote(RemoteBlocks(args.model, client=client), cores)
            if hops > 1:
                one_by_one = RemoteBlocks(args.model, client=client, pieces_under_way=1)
                ways[f"{name}, no pipeline"] = make_remote(one_by_one, cores)
        yield ways


def print_table(batch: int, tokens: int, samples: dict[str, list[Sample]]) -> None:
    count = batch * tokens
    print(f"\nbatch of {batch} x {tokens} tokens")
    print(
        f"{'':20} {'forward, tokens/s':>26} {'ratio':>20} "
        f"{'and backward, tokens/s':>26} {'ratio':>20} {'busy':>20}"
    )
    for name, runs in samples.items():
        columns = [f"{name:20}"]
        for kind in ("forward_s", "both_s"):
            taken = [getattr(run, kind) for run in runs]
            base = [getattr(run, kind) for run in samples[BASE]]
            columns.append(f"{spread([count / seconds for seconds in taken]):>26}")
            ratios = [one / seconds for seconds, one in zip(taken, base, strict=True)]
            columns.append(f"{spread(ratios):>20}")
        busy = [run.busy for run in runs if run.busy is not None]
        columns.append(f"{spread(busy) if busy else '':>20}")
        print(" ".join(columns))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--hops", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    machine = describe_machine()
    print(f"{machine}; n = {args.rounds}")
    folder = find_model(args.model).path
    width = Checkpoint(folder).config.hidden_size
    results: dict[int, dict[str, list[Sample]]] = {}
    with open_ways(args, folder, cores) as ways:
        for batch in args.batches:
            generator = torch.Generator().manual_seed(batch)
            hidden_BSD = torch.randn(batch, args.tokens, width, generator=generator)
            results[batch] = {name: [] for name in ways}
            for measure in ways.values():  # to warm up
                measure(hidden_BSD[:WARM_UP_SEQUENCES])
            for _ in range(args.rounds):
                for name, measure in ways.items():
                    results[batch][name].append(measure(hidden_BSD))
            print_table(batch, args.tokens, results[batch])
    plain: dict[int, Any] = {
        batch: {name: [vars(run) for run in runs] for name, runs in samples.items()}
        for batch, samples in results.items()
    }
    write_results("training", machine, args, plain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
