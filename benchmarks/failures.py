"""Decode speed against the probability that a hop fails in a step, and the pause of one failure.

    python benchmarks/failures.py [--lengths 128 1024] [--rounds 8 3] [--pauses 6]

Real daemons on loopback: three hops, two servers for each. In the first part a hop that fails loses
all its connections (they are reset by the link emulator) and with them its sessions, and is a fresh
server again at once. Which hop fails at which step is drawn beforehand, by a seed, is the same for
every strategy, and over all rounds together as often as is to be expected (`failures_draw`):

- *petald*: the session recovers;
- *restart*: at a failure the job is given up, without any time for noticing it, and a new one
  prefills the prompt and all tokens made so far, on a new chain, with caches as ever;
- *no cache*: every step sends the whole text through the chain, and keeps nothing that could be
  lost; a failure repeats the step. It is measured at some lengths without failures, in one session
  that begins at position 0 each time, by the daemon's own time from the request to the token. A
  job's beginning is still in it, which a loop over steps would not pay. The rest follows by
  arithmetic, in its favour: a failure costs it one more step, and no new connection.

Without failures a restart is the same as petald, and is not measured again. A length is the number
of tokens generated, from a prompt of eight. Each round runs petald without failures before and
after the runs of each strategy; what the ratios mean says `failures_table`. Of petald's runs is
told which failures did not show as a move, and which moves none of them explains; of a restart,
which failures broke no connection. The second part is `failures_pauses`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.failures_draw import (
    HOPS,
    Failures,
    Strike,
    count_expected,
    draw_failures,
    match_moves,
)
from benchmarks.failures_pauses import measure_pauses, print_pauses
from benchmarks.failures_swarm import Bench, open_bench, read_tokens
from benchmarks.failures_table import Run, Speeds, pair, print_speeds
from benchmarks.report import describe_machine, write_results

PROMPT_TOKENS = 8
PROBABILITIES = (1e-4, 1e-3, 1e-2)
NO_CACHE_SAMPLES = 6
NO_CACHE_SESSION = "no cache"
SETTLE_S = 0.5
"""After each run, so that the next one does not pay for its broken connections."""


@dataclass(frozen=True)
class Text:
    """A prompt that the model does not stop to continue, and what it makes of it undisturbed."""

    prompt: list[int]
    tokens: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.tokens) - 1


def find_text(bench: Bench, length: int) -> Text:
    for seed in range(50):
        prompt = bench.prompt(PROMPT_TOKENS, seed)
        done = bench.client.generate(prompt_tokens=prompt, max_new_tokens=length + 1).result()
        if len(done.tokens) == length + 1:
            return Text(prompt, done.tokens)
    raise SystemExit(f"the model ends every text before {length} tokens; try other lengths")


def run_petald(bench: Bench, text: Text, failures: Failures) -> Run:
    generation = bench.client.generate(prompt_tokens=text.prompt, max_new_tokens=len(text.tokens))
    times: list[float] = []
    strikes: list[Strike] = []
    for _ in read_tokens(generation):
        step = len(times)
        times.append(time.perf_counter())
        strikes += bench.fail(generation, step, failures.get(step, ()))[0]
    result = generation.result()
    if result.tokens != text.tokens:
        raise SystemExit("the tokens are not those of the undisturbed run")
    unseen, unexplained = match_moves(strikes, result.moves)
    return Run(text.steps, times[-1] - times[0], len(strikes), unseen, unexplained)


def run_restart(bench: Bench, text: Text, failures: Failures) -> Run:
    so_far = list(text.prompt)
    times: list[float] = []
    run = Run(text.steps, 0.0)
    while len(times) <= text.steps:
        generation = bench.client.generate(
            prompt_tokens=so_far, max_new_tokens=len(text.tokens) - len(times)
        )
        for token in read_tokens(generation):
            step = len(times)
            times.append(time.perf_counter())
            so_far.append(token)
            if step in failures:
                strikes, vain = bench.fail(generation, step, failures[step])
                run.failures += len(strikes)
                run.unseen += vain
                break
        else:
            if len(times) <= text.steps:
                raise SystemExit(f"after a restart the model ended after {len(times)} tokens")
        generation.close()
    run.seconds = times[-1] - times[0]
    return run


def run_without_cache(bench: Bench, length: int) -> Run:
    """Steps at some lengths of text; a first one opens the session and does not count."""
    times_s = []
    for sample in (NO_CACHE_SAMPLES - 1, *range(NO_CACHE_SAMPLES)):
        tokens = PROMPT_TOKENS + round((sample + 0.5) * length / NO_CACHE_SAMPLES)
        done = bench.client.generate(
            prompt_tokens=bench.prompt(tokens),
            max_new_tokens=1,
            session=NO_CACHE_SESSION,
            max_session_tokens=PROMPT_TOKENS + length + 1,
        ).result()
        if done.timings.prefilled_tokens != tokens:
            raise SystemExit("a part of the text was still in the cache")
        times_s.append(done.timings.first_token_s)
    bench.client.close_session(NO_CACHE_SESSION)
    return Run(NO_CACHE_SAMPLES, sum(times_s[1:]))


def repeat_failed_steps(run: Run, probability: float) -> Run:
    """The same with failures: how often a step without cache is tried until no hop fails."""
    return dataclasses.replace(run, seconds=run.seconds * (1 - probability) ** -HOPS)


def measure_speeds(bench: Bench, length: int, rounds: int) -> Speeds:
    text = find_text(bench, length)
    drawn = {
        p: draw_failures(length, p, rounds)
        for p in PROBABILITIES
        if count_expected(length, p, rounds) >= 1
    }
    speeds = Speeds(length, rounds, [run_petald(bench, text, {})])
    speeds.runs = {name: {p: [] for p in PROBABILITIES} for name in ("petald", "restart")}
    speeds.runs["no cache"] = {p: [] for p in (0.0, *PROBABILITIES)}
    ways = {"petald": run_petald, "restart": run_restart}
    for number, (name, way) in itertools.product(range(rounds), ways.items()):
        fresh = []
        for p, failures in drawn.items():
            fresh.append(way(bench, text, failures[number]))
            speeds.runs[name][p].append(fresh[-1])
            time.sleep(SETTLE_S)
        if name == "restart":
            whole = run_without_cache(bench, length)
            for p, runs in speeds.runs["no cache"].items():
                fresh.append(repeat_failed_steps(whole, p))
                runs.append(fresh[-1])
        speeds.undisturbed.append(run_petald(bench, text, {}))
        for run in fresh:
            pair(run, *speeds.undisturbed[-2:])
    return speeds


def print_strangers(bench: Bench) -> int:
    """Connections that no failure reaches, since the emulator does not know whose they are."""
    strangers = bench.links.strangers
    if strangers:
        print(f"NOT VALID: {strangers} connection(s) came from nobody known, and were not broken")
    return strangers


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument(
        "--rounds",
        type=int,
        nargs="+",
        default=[8, 3],
        help="of each length; the last one given is that of all lengths that follow",
    )
    parser.add_argument("--pauses", type=int, default=6, help="failures of each kind")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.rounds += args.rounds[-1:] * (len(args.lengths) - len(args.rounds))
    return args


def main() -> int:
    args = parse_arguments()
    machine = describe_machine()
    print(f"{machine}; {args.threads} thread(s), {HOPS} hops", flush=True)
    results: dict[str, object] = {}
    with open_bench(args.model, args.threads) as bench:
        for length, rounds in zip(args.lengths, args.rounds, strict=False):
            speeds = measure_speeds(bench, length, rounds)
            print_speeds(speeds)
            results[f"speeds {length}"] = dataclasses.asdict(speeds)
        results["strangers"] = print_strangers(bench)
        print(flush=True)
        for context, kind in itertools.product(args.lengths, ("kill", "hang")):
            if args.pauses:
                number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
                pauses = measure_pauses(bench, context, number, args.pauses)
                print_pauses(context, kind, pauses)
                results[f"{kind} {context}"] = [vars(pause) for pause in pauses]
    write_results("failures", machine, args, results)
    return 1 if results["strangers"] else 0


if __name__ == "__main__":
    sys.exit(main())
