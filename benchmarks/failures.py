"""Decode speed against the probability that a hop fails in a step, and the pause of one failure.

    python benchmarks/failures.py [--lengths 128 1024] [--rounds 3] [--pauses 8]

Real daemons on loopback: three hops, two servers for each. In the first part a hop that fails loses
all its connections (they are reset by the link emulator) and with them its sessions, and is a fresh
server again at once. Which hop fails at which step is drawn beforehand, by a seed, and is the same
for every strategy:

- *petald*: the session recovers;
- *restart*: at a failure the job is given up, and a new one prefills the prompt and all tokens made
  so far, on a new chain, with caches as ever;
- *no cache*: every step sends the whole text through the chain. It keeps nothing that could be
  lost; a failure repeats the step. It is measured at some lengths without failures, and the rest
  follows by arithmetic, since it takes a minute for what the others do in a second.

A length is the number of tokens generated, from a prompt of eight. The second part kills (SIGKILL)
or stops (SIGSTOP) a hop's process, and tells detection and rebuild apart: the gap between two
tokens that a reader of the stream sees, less a usual step, less the rebuild as petald reports it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.link_emulator import LinkEmulator
from benchmarks.report import describe_machine, spread, write_results
from kernels.checkpoint import Checkpoint
from kernels.model_store import find_model
from petalctl.client import Client, Generation
from petalctl.daemon_process import DaemonProcess
from petalctl.private_swarm import PrivateSwarm

HOPS = 3
PROMPT_TOKENS = 8
PROBABILITIES = (0.0, 1e-4, 1e-3, 1e-2)
AIMS = {(128, 1e-3): 0.97, (128, 1e-2): 0.80, (1024, 1e-3): 0.90, (1024, 1e-2): 0.60}
PUBLISHED = {(128, 1e-3): 0.93, (128, 1e-2): 0.30, (1024, 1e-3): 0.73, (1024, 1e-2): 0.20}
"""Of the ancestor's algorithm, relative to its own speed without failures."""

Failures = dict[int, list[int]]
"""For each step, the hops that fail in it."""


def draw_failures(length: int, probability: float, seed: int) -> Failures:
    rng = random.Random(f"{length} {probability} {seed}")
    drawn = {step: [h for h in range(HOPS) if rng.random() < probability] for step in range(length)}
    return {step: hops for step, hops in drawn.items() if hops}


class Bench:
    """The swarm, and who is who in it."""

    def __init__(self, swarm: PrivateSwarm, links: LinkEmulator, client: Client, vocabulary: int):
        self.swarm = swarm
        self.links = links
        self.client = client
        self.vocabulary = vocabulary
        self.servers: dict[str, DaemonProcess] = {}
        for server in swarm.servers:
            self.learn(server)

    def learn(self, server: DaemonProcess) -> None:
        with Client(server.socket) as own:
            self.servers[own.status().peer] = server

    def prompt(self, tokens: int, seed: int = 0) -> list[int]:
        rng = random.Random(f"{tokens} {seed}")
        return [rng.randrange(100, self.vocabulary - 100) for _ in range(tokens)]

    def at_hop(self, generation: Generation, hop: int) -> DaemonProcess:
        middle = (hop + 0.5) * generation.chain[-1].end / HOPS
        for part in generation.chain:
            if part.start <= middle < part.end:
                return self.servers[part.peer]
        raise SystemExit("the chain has a gap")

    def fail(self, generation: Generation, hops: list[int]) -> None:
        for hop in hops:
            self.links.break_connections(self.at_hop(generation, hop).name)


@dataclass(frozen=True)
class Text:
    """A prompt that the model does not stop to continue, and what it makes of it undisturbed."""

    prompt: list[int]
    tokens: tuple[int, ...]


def find_text(bench: Bench, length: int) -> Text:
    for seed in range(50):
        prompt = bench.prompt(PROMPT_TOKENS, seed)
        done = bench.client.generate(prompt_tokens=prompt, max_new_tokens=length + 1).result()
        if len(done.tokens) == length + 1:
            return Text(prompt, done.tokens)
    raise SystemExit(f"the model ends every text before {length} tokens; try other lengths")


def run_petald(bench: Bench, text: Text, length: int, failures: Failures) -> float:
    prompt = text.prompt
    generation = bench.client.generate(prompt_tokens=prompt, max_new_tokens=length + 1)
    first_at = 0.0
    for _ in generation:
        step = len(generation.tokens) - 1
        first_at = first_at or time.perf_counter()
        bench.fail(generation, failures.get(step, []))
    if generation.tokens != text.tokens:
        raise SystemExit("the tokens are not those of the undisturbed run")
    return length / (time.perf_counter() - first_at)


def run_restart(bench: Bench, text: Text, length: int, failures: Failures) -> float:
    so_far = list(text.prompt)
    failures = dict(failures)
    first_at = 0.0
    made = 0
    while made < length + 1:
        generation = bench.client.generate(prompt_tokens=so_far, max_new_tokens=length + 1 - made)
        told = 0
        for _ in generation:
            fresh = generation.tokens[told:]
            told += len(fresh)
            so_far += fresh
            made += len(fresh)
            first_at = first_at or time.perf_counter()
            hops = failures.pop(made - 1, None)
            if hops:
                bench.fail(generation, hops)
                break
        else:
            if made < length + 1:
                raise SystemExit(f"after a restart the model ended after {made} tokens")
        generation.close()
    return length / (time.perf_counter() - first_at)


def run_without_cache(bench: Bench, length: int, probability: float, samples: int = 6) -> float:
    times_s = []
    for sample in range(samples):
        tokens = PROMPT_TOKENS + round((sample + 0.5) * length / samples)
        started_at = time.perf_counter()
        bench.client.generate(prompt_tokens=bench.prompt(tokens), max_new_tokens=1).result()
        times_s.append(time.perf_counter() - started_at)
    tries = (1 - probability) ** -HOPS
    return 1 / (statistics.mean(times_s) * tries)


def measure_speeds(bench: Bench, length: int, rounds: int) -> dict[str, dict[float, list[float]]]:
    speeds: dict[str, dict[float, list[float]]] = {
        name: {p: [] for p in PROBABILITIES} for name in ("petald", "restart", "no cache")
    }
    text = find_text(bench, length)
    for round_number, p in itertools.product(range(rounds), PROBABILITIES):
        failures = draw_failures(length, p, round_number)
        speeds["petald"][p].append(run_petald(bench, text, length, failures))
        speeds["restart"][p].append(run_restart(bench, text, length, failures))
        speeds["no cache"][p].append(run_without_cache(bench, length, p))
    return speeds


def print_speeds(length: int, speeds: dict[str, dict[float, list[float]]]) -> None:
    print(f"\n{length} tokens: steps/s, and their ratio to petald's own without failures")
    base = speeds["petald"][0.0]
    for name, by_probability in speeds.items():
        for p, values in by_probability.items():
            ratios = [value / one for value, one in zip(values, base, strict=True)]
            line = f"{name:10} p = {p:<7g} {spread(values):>26}  {spread(ratios):>24}"
            if name == "petald" and (length, p) in AIMS:
                line += f"  aim {AIMS[length, p]}, ancestor {PUBLISHED[length, p]}"
            print(line)


@dataclass(frozen=True)
class Pause:
    """What one failure cost."""

    detection_ms: float
    rebuild_ms: float


def measure_pause(bench: Bench, context: int, number: signal.Signals, hop: int) -> Pause:
    generation = bench.client.generate(prompt_tokens=bench.prompt(context), max_new_tokens=40)
    times = []
    victim: DaemonProcess | None = None
    struck_at = math.inf
    for _ in generation:
        times.append(time.perf_counter())
        if len(times) == 20:
            victim = bench.at_hop(generation, hop)
            os.kill(victim.pid, number)
            struck_at = time.perf_counter()
    assert victim is not None
    result = generation.result()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    usual_s = statistics.median(gaps)
    pause_s = max(after - max(before, struck_at) for before, after in itertools.pairwise(times))
    rebuild_s = sum(move.pause_s for move in result.moves if move.reason != "better")
    if not rebuild_s:
        raise SystemExit("a hop was killed, and nothing moved")
    restore(bench, victim)
    return Pause(1e3 * max(0.0, pause_s - usual_s - rebuild_s), 1e3 * rebuild_s)


def restore(bench: Bench, victim: DaemonProcess) -> None:
    if victim.is_running:
        os.kill(victim.pid, signal.SIGCONT)
    else:
        assert victim.span is not None
        bench.learn(bench.swarm.add_server(victim.span))
    time.sleep(1.0)


def print_pauses(context: int, kind: str, pauses: list[Pause]) -> None:
    for part in ("detection", "rebuild"):
        values = [getattr(pause, f"{part}_ms") for pause in pauses]
        print(
            f"{kind:8} after {context:5} tokens  {part:10} median {statistics.median(values):7.0f}"
            f" ms, worst {max(values):7.0f} ms   (n = {len(values)})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pauses", type=int, default=8, help="failures of each kind")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    machine = describe_machine()
    print(f"{machine}; {args.threads} thread(s), {HOPS} hops, n = {args.rounds}")
    config = Checkpoint(find_model(args.model).path).config
    borders = [round(config.num_blocks * hop / HOPS) for hop in range(HOPS + 1)]
    spans = list(itertools.pairwise(borders)) * 2
    results: dict[str, object] = {}
    with (
        LinkEmulator() as links,
        PrivateSwarm(args.model, spans, threads=args.threads, links=links) as swarm,
        swarm.client() as client,
    ):
        bench = Bench(swarm, links, client, config.vocab_size)
        for length in args.lengths:
            speeds = measure_speeds(bench, length, args.rounds)
            print_speeds(length, speeds)
            results[f"speeds {length}"] = speeds
        for context, number in itertools.product(
            args.lengths, (signal.SIGKILL, signal.SIGSTOP) if args.pauses else ()
        ):
            kind = "kill" if number == signal.SIGKILL else "hang"
            pauses = [
                measure_pause(bench, context, number, trial % HOPS) for trial in range(args.pauses)
            ]
            print_pauses(context, kind, pauses)
            results[f"{kind} {context}"] = [vars(pause) for pause in pauses]
    write_results("failures", machine, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
