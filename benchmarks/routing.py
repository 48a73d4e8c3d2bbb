"""How long the choice of a route takes, of one chain and of parallel ones, among 10,000 servers.

    python benchmarks/routing.py [--sizes 100 1000 10000] [--seeds 7] [--chains 8]

Swarms of a 126-block model are made at random, by seed: spans of 4 to 40 blocks, speeds spread over
20x, four announced round trips each. For each seed every way is run once, in turn, after one that
warms up; printed are the median over the seeds and the least and most, in milliseconds that passed
and in milliseconds of this process's CPU time (a machine that is busy otherwise shows in the first
only). *Made* is with the view's columns already made, as they are when a second choice is made from
one view; *making* includes that.

The plain ways do the same without numpy, as one would first write it down: for one chain a dynamic
program over blocks and servers that looks at every pair; for parallel chains a bisection of the
throughput, and servers taken from a heap by the end of their span. (It finds the throughput and who
does what, and makes no chains.) They run where they end within seconds, and what they find must be
what the fast ones found. Told, too, is which share of the greatest throughput is kept by so few
chains, and how many hops they have.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs as a file, from anywhere

from benchmarks.report import describe_machine, spread, write_results
from petald.parallel_routing import choose_parallel_chains
from petald.routing import UNKNOWN_ROUND_TRIP_S, chain_cost_s, choose_chain
from petald.swarm import (
    MAX_ROUND_TRIPS,
    Announcement,
    RoundTripTo,
    Server,
    ServerState,
    SwarmView,
    make_view,
    peer_digest,
)

BLOCKS = 126
SHORTEST, LONGEST = 4, 40
SPREAD = 20.0
MODEL = bytes(32)
AIM_MS = 50.0
BISECTIONS = 40
PLAIN_CHAIN_SERVERS = 1000
"""With ten times as many, every pair takes a hundred times as long: minutes."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one way."""

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True, kw_only=True)
class Split:
    """What parallel chains are worth.

    Attributes:
        kept: of the greatest throughput that any number of chains has.
        hops: in the mean.
    """

    kept: float
    hops: float


def make_server(number: int, count: int, rng: random.Random) -> Server:
    start = rng.randrange(BLOCKS - SHORTEST)
    if number * SHORTEST < BLOCKS:  # the first few cover the model
        start = min(number * SHORTEST, BLOCKS - SHORTEST)
    end = min(BLOCKS, start + rng.randint(SHORTEST, LONGEST))
    block_ms = SPREAD ** rng.random()
    others = [str(rng.randrange(count)) for _ in range(MAX_ROUND_TRIPS)]
    return Server(
        peer=str(number),
        round_trip_s=rng.choice([None, rng.uniform(0.001, 0.3)]),
        announcement=Announcement(
            model=MODEL,
            start=start,
            end=end,
            state=ServerState.SERVING,
            step_ms=block_ms * (end - start),
            prefill_ms=rng.choice([0.0, block_ms * (end - start) / rng.uniform(2, 20)]),
            cache_tokens=1000,
            free_cache_tokens=1000,
            dtype="float32",
            round_trips=tuple(
                RoundTripTo(peer=peer_digest(other), ms=rng.uniform(1, 100))
                for other in others
                if other != str(number)
            ),
        ),
    )


def make_swarm(count: int, seed: int) -> list[Server]:
    rng = random.Random(seed)
    return [make_server(number, count, rng) for number in range(count)]


def plain_chain_s(view: SwarmView) -> float:
    """The least time of a decode step, by looking at every pair of servers at every block."""
    servers = {server.peer: server for server in view.servers}
    peers = {peer_digest(peer): peer for peer in servers}
    client_s = {
        peer: (UNKNOWN_ROUND_TRIP_S if server.round_trip_s is None else server.round_trip_s) / 2
        for peer, server in servers.items()
    }
    known_s: dict[tuple[str, str], float] = {}
    for is_reverse in (True, False):  # what a server announced itself comes last, and stays
        for peer, server in servers.items():
            for trip in reversed(server.announcement.round_trips):
                if trip.peer in peers:
                    other = peers[trip.peer]
                    pair = (other, peer) if is_reverse else (peer, other)
                    known_s[pair] = trip.ms / 2e3
    done_s: dict[str, float] = {}
    for block in range(BLOCKS):
        reached_s: dict[str, float] = {}
        for peer, server in servers.items():
            if not server.start <= block < server.end:
                continue
            enter_s = client_s[peer] if block == 0 else math.inf
            for other, so_far_s in done_s.items():
                if other != peer:
                    way_s = known_s.get((other, peer), client_s[other] + client_s[peer])
                    enter_s = min(enter_s, so_far_s + way_s)
            enter_s += (server.announcement.queue_ms + server.announcement.send_ms) / 1e3
            block_s = server.announcement.step_ms / 1e3 / (server.end - server.start)
            reached_s[peer] = min(done_s.get(peer, math.inf), enter_s) + block_s
        done_s = reached_s
    return min(so_far_s + client_s[peer] for peer, so_far_s in done_s.items())


def plain_flow(view: SwarmView) -> float:
    """The most tokens a second for every block, by bisection."""
    beginning: list[list[tuple[int, str, float]]] = [[] for _ in range(BLOCKS)]
    for server in view.servers:
        said = server.announcement
        token_ms = said.prefill_ms or said.step_ms / 4
        capacity = 1e3 * (server.end - server.start) / token_ms
        beginning[server.start].append((server.end, server.peer, capacity))

    def is_possible(flow: float) -> bool:
        heap: list[tuple[int, str, float]] = []
        pieces: list[tuple[int, str, float]] = []
        for block in range(BLOCKS):
            for one in beginning[block]:
                heapq.heappush(heap, one)
            needed = flow
            while needed > 0:
                if not heap:
                    return False
                end, peer, left = heapq.heappop(heap)
                if end > block:
                    given = min(left, needed)
                    pieces.append((block, peer, given))
                    needed -= given
                    if left > given:
                        heapq.heappush(heap, (end, peer, left - given))
        return True

    low, high = 0.0, sum(capacity for servers in beginning for *_, capacity in servers) / BLOCKS
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_possible(middle) else (low, middle)
    return low


def measure(run: Callable[[], object]) -> Sample:
    gc.collect()  # what the making of the swarm left behind is not counted
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    run()
    return Sample(
        wall_ms=(time.perf_counter() - wall_s) * 1e3, cpu_ms=(time.process_time() - cpu_s) * 1e3
    )


def check(view: SwarmView) -> None:
    """The plain ways and the fast ones agree."""
    fast_s = chain_cost_s(view, choose_chain(view, needed_tokens=1))
    if not math.isclose(fast_s, plain_chain_s(view), rel_tol=1e-9):
        raise SystemExit("the two choices of a chain differ")
    chains = choose_parallel_chains(view, max_chains=100 * len(view.servers))
    total = sum(chain.tokens_per_s for chain in chains)
    if not math.isclose(total, plain_flow(view), rel_tol=1e-7):
        raise SystemExit("the two splits over parallel chains differ")


def measure_seed(size: int, seed: int, chains: int, samples: dict[str, list[Sample]]) -> Split:
    """Runs every way once on one swarm, and notes how long each took.

    Returns:
        What the parallel chains keep of the greatest throughput, and how many hops each has.
    """
    servers = make_swarm(size, seed)

    def fresh() -> SwarmView:
        return make_view(MODEL, BLOCKS, servers)

    def one(view: SwarmView) -> object:
        return choose_chain(view, needed_tokens=1)

    def parallel(view: SwarmView) -> object:
        return choose_parallel_chains(view, max_chains=chains)

    view, unread, unread_too = fresh(), fresh(), fresh()
    one(view), parallel(view), one(fresh())
    ways: dict[str, Callable[[], object]] = {
        "one chain, made": lambda: one(view),
        "one chain, making": lambda: one(unread),
        "parallel, made": lambda: parallel(view),
        "parallel, making": lambda: parallel(unread_too),
        "parallel, plain": lambda: plain_flow(view),
    }
    if size <= PLAIN_CHAIN_SERVERS:
        ways["one chain, plain"] = lambda: plain_chain_s(view)
    for name, run in ways.items():
        samples.setdefault(name, []).append(measure(run))
    found = choose_parallel_chains(view, max_chains=chains)
    return Split(
        kept=sum(chain.tokens_per_s for chain in found) / plain_flow(view),
        hops=statistics.mean(len(chain.hops) for chain in found),
    )


def print_table(size: int, samples: dict[str, list[Sample]]) -> None:
    print(f"\n{size} servers")
    print(f"{'':20} {'ms':>28} {'CPU ms':>28} {'times quicker than plain':>28}")
    for name in sorted(samples):
        runs = samples[name]
        plain = samples.get(f"{name.partition(',')[0]}, plain", [])
        ratios = [slow.cpu_ms / run.cpu_ms for slow, run in zip(plain, runs, strict=False)]
        print(
            f"{name:20} {spread([run.wall_ms for run in runs]):>28} "
            f"{spread([run.cpu_ms for run in runs]):>28} {spread(ratios) if ratios else '':>28}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--chains", type=int, default=8)
    args = parser.parse_args()
    machine = describe_machine()
    print(f"{machine}; {BLOCKS} blocks, {args.chains} chains, n = {args.seeds}; aim {AIM_MS} ms")
    results: dict[int, dict[str, list[Sample]]] = {}
    splits: dict[int, list[Split]] = {}
    for size in args.sizes:
        if size <= PLAIN_CHAIN_SERVERS:
            check(make_view(MODEL, BLOCKS, make_swarm(size, 0)))
        results[size] = {}
        splits[size] = [
            measure_seed(size, seed, args.chains, results[size]) for seed in range(args.seeds)
        ]
        print_table(size, results[size])
        print(f"kept of the greatest throughput: {spread([split.kept for split in splits[size]])}")
        print(f"hops of a chain: {spread([split.hops for split in splits[size]])}")
    plain = {
        size: {
            "times": {name: [vars(run) for run in runs] for name, runs in samples.items()},
            "splits": [vars(split) for split in splits[size]],
        }
        for size, samples in results.items()
    }
    write_results("routing", machine, args, plain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
