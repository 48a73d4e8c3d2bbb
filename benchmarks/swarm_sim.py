"""How well swarms of servers that choose their own blocks are balanced, from 100 to 10,000 of them.

    python benchmarks/swarm_sim.py [--quick | --full] [--sizes 100 300 1000 3000 10000] [--seeds 20]

For each size and seed a swarm joins within ten minutes and settles for half an hour more (from 1000
servers on, for ten minutes); then a third of its servers is replaced in each hour, half of them
without a word. The deciders are the
real ones; what stands in for the network, and what the servers are like, says
`benchmarks/swarm_sim_world.py`. The rule of the ancestor runs in the same worlds, for fewer seeds.

Told is, as the median over the seeds (least to most), with the *ratio* being the throughput of the
least-served block over the mean of all blocks, which no placement can exceed (of the servers that
serve at that time: what is still being loaded counts in neither):

joined     the ratio in the last minute before the churn
churn      its mean over the time of churn, and its median over samples of every 5 s
memory     what of the mean could be reached at best, for want of memory on quick servers
hops       that a chain has, if each server is in as many as it has steps to give
times      how many times the servers could hold the model, when that was least under churn
gap_s      for how long some block had no server, under churn
moves      of a server in an hour of churn: in the median and the mean over those that were there
           for half an hour of it at least, urgent ones included; and while joining, in the mean

Then, in the same worlds without churn, all who hold some block die at once without a word, and
nobody comes instead: told is how long it takes until every block has a server that serves it. For
up to 45 s of that nobody knows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

import numpy as np

from benchmarks.report import describe_machine, spread, write_results
from benchmarks.swarm_sim_directory import Views
from benchmarks.swarm_sim_rules import RULES
from benchmarks.swarm_sim_world import BLOCKS, SimServer, SimSettings, World, memory_bound

AIM_JOINED, AIM_CHURN = 0.95, 0.90
LEAST_STAY_S = 1800.0
STRIKE_WATCH_S = 900.0
LARGE, LARGE_SETTLE_S = 1000, 1200.0
"""A swarm so large has come to rest when the last has joined."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one run; the fields of the churn are none where there was none."""

    joined: float
    memory: float
    hops: float
    join_moves: float
    churn_mean: float | None
    churn_median: float | None
    times: float | None
    gap_s: float | None
    moves_median: float | None
    moves_mean: float | None
    wall_s: float


def simulate(rule: str, settings: SimSettings) -> Outcome:
    """One run, by seed; only ``wall_s`` differs from one time to the next."""
    began = time.perf_counter()
    choose, make_rule = RULES[rule]
    world = World(settings, choose=choose, make_rule=make_rule())
    world.run()
    churn_at = settings.settle_s
    joined = [one.ratio for one in world.samples if churn_at - 60 <= one.at <= churn_at]
    churn = [one for one in world.samples if one.at > churn_at]
    first = [server for server in world.servers if server.born_at <= churn_at]
    moves = [len([at for at in server.moved_at if at <= churn_at]) for server in first]
    rates = move_rates(world.servers, churn_at, churn_at + settings.churn_s)
    return Outcome(
        joined=statistics.median(joined),
        memory=memory_bound(first),
        hops=mean_hops(world.servers),
        join_moves=statistics.mean(moves),
        churn_mean=statistics.mean(one.ratio for one in churn) if churn else None,
        churn_median=statistics.median(one.ratio for one in churn) if churn else None,
        times=min(one.times for one in churn) if churn else None,
        gap_s=sum(max(0.0, end - max(start, churn_at)) for start, end in world.gaps)
        if churn
        else None,
        moves_median=statistics.median(rates) if rates else None,
        moves_mean=statistics.mean(rates) if rates else None,
        wall_s=time.perf_counter() - began,
    )


def mean_hops(servers: Sequence[SimServer]) -> float:
    """Servers that a chain crosses, if it takes each as often as it does steps."""
    throughput_L, hops_L = np.zeros(BLOCKS), np.zeros(BLOCKS)
    for server in servers:
        if server.is_alive and server.span is not None:
            start, end = server.span
            throughput_L[start:end] += server.speed / (end - start)
            hops_L[start:end] += server.speed / (end - start) ** 2
    return float((hops_L / np.maximum(throughput_L, 1e-9)).sum())


def move_rates(servers: Sequence[SimServer], start: float, end: float) -> list[float]:
    """Moves in an hour, of each server that was there for long enough of a time."""
    rates = []
    for server in servers:
        died_at = end if server.died_at is None else server.died_at
        stay_s = died_at - max(server.born_at, start)
        if stay_s >= min(LEAST_STAY_S, end - start) > 0:
            moves = [at for at in server.moved_at if at > start]
            rates.append(3600.0 * len(moves) / stay_s)
    return rates


def simulate_strike(settings: SimSettings) -> float:
    """How long it takes to close a gap; infinite where it stays open for a quarter of an hour."""
    settings = replace(settings, churn_s=STRIKE_WATCH_S, replaced_per_hour=1e-9, strike_s=60.0)
    choose, make_rule = RULES["petald"]
    world = World(settings, choose=choose, make_rule=make_rule())
    world.run()
    struck_at, until = settings.settle_s + 60.0, settings.settle_s + settings.churn_s
    open_s = [end - start for start, end in world.gaps if start >= struck_at]
    return float("inf") if any(end >= until for _, end in world.gaps) else max(open_s, default=0.0)


def _simulate(task: tuple[str, SimSettings]) -> Outcome:
    return simulate(*task)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.2f} to {max(values):.2f})"


def print_table(rule: str, outcomes: dict[int, list[Outcome]]) -> None:
    print(f"\n{rule}")
    names = ["joined", "churn_mean", "churn_median", "memory", "times", "gap_s", "hops"]
    names += ["moves_median", "moves_mean", "join_moves"]
    print(f"{'servers':>8} {'n':>6}" + "".join(f" {name:>22}" for name in names))
    for size, runs in outcomes.items():
        cells = []
        for name in names:
            values = [value for run in runs if (value := getattr(run, name)) is not None]
            cells.append(f" {_spread(values) if values else '':>22}")
        churned = sum(run.churn_mean is not None for run in runs)
        print(f"{size:>8} {f'{len(runs)}/{churned}':>6}" + "".join(cells))


def make_tasks(args: argparse.Namespace, rule: str) -> list[tuple[str, SimSettings]]:
    tasks = []
    for size in args.sizes:
        seeds = args.seeds if rule == "petald" else args.ancestor_seeds
        if rule == "ancestor" and size > args.ancestor_size:
            continue
        for seed in range(seeds):
            settings = SimSettings(
                servers=size,
                seed=seed,
                crashes=args.crashes,
                views=Views(args.views),
                error=args.error,
            )
            if size >= LARGE:
                settings = replace(settings, settle_s=LARGE_SETTLE_S)
            has_churn = size < LARGE or seed < args.churn_seeds
            churn_s = 3600.0 * args.hours if has_churn else 0.0
            tasks.append((rule, replace(settings, churn_s=churn_s)))
    return tasks


def strike_all(args: argparse.Namespace, pool: Any) -> dict[int, list[object]]:
    """Prints and gives how long gaps took to close."""
    print(f"\n{'servers':>8} {'n':>6} {'s until a gap is closed, and at worst':>40}")
    found: dict[int, list[object]] = {}
    for size in args.sizes:
        if size > args.strike_size or not args.strike_seeds:
            continue
        settings = [one for _, one in make_tasks(args, "petald") if one.servers == size]
        closed_s = pool.map(simulate_strike, settings[: args.strike_seeds])
        print(f"{size:>8} {len(closed_s):>6} {spread(closed_s):>33} {max(closed_s):>6.0f}")
        found[size] = list(closed_s)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few small swarms: half a minute")
    parser.add_argument("--full", action="store_true", help="20 seeds: 40 minutes of two cores")
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 300, 1000, 3000, 10_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=1.0, help="of churn")
    parser.add_argument("--crashes", type=float, default=0.5, help="of those that go")
    parser.add_argument("--error", type=float, default=0.1, help="of what servers measure")
    parser.add_argument("--views", choices=[*Views], default=Views.KIN, help="of large swarms")
    parser.add_argument("--churn-seeds", type=int, default=1, help="of them, from 1000 servers on")
    parser.add_argument("--ancestor-seeds", type=int, default=1)
    parser.add_argument("--ancestor-size", type=int, default=1000, help="its largest swarm")
    parser.add_argument("--strike-seeds", type=int, default=3)
    parser.add_argument("--strike-size", type=int, default=1000, help="the largest swarm struck")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.seeds = [100, 300], 2
    if args.full:
        args.seeds, args.churn_seeds, args.ancestor_seeds = 20, 20, 3
        args.strike_seeds = 20
    machine = describe_machine()
    print(f"{machine}; aims: joined {AIM_JOINED}, churn {AIM_CHURN}, less than 1 move an hour")
    print("n: seeds, and those of them with churn")
    results: dict[str, dict[int, list[object]]] = {}
    with Pool(args.processes) as pool:
        for rule in RULES:
            tasks = make_tasks(args, rule)
            outcomes: dict[int, list[Outcome]] = {}
            for (_, settings), outcome in zip(tasks, pool.imap(_simulate, tasks), strict=True):
                outcomes.setdefault(settings.servers, []).append(outcome)
            print_table(rule, outcomes)
            results[rule] = {size: [asdict(one) for one in runs] for size, runs in outcomes.items()}
        strikes = strike_all(args, pool)
    results["gaps_closed_s"] = strikes
    write_results("swarm_sim", machine, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
