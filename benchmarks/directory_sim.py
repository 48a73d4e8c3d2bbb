"""What the directory costs and how well it works, from 100 to 10,000 servers of one model.

    python -m benchmarks.directory_sim [--quick] [--seed N]

The deciders are the daemon's, on an event heap; see `benchmarks.directory_sim_world` for what is
simulated and what is not. Each row is a swarm; a fifth of its peers, and so of the holders, lies
(repeats what was true half a minute before, as if it were fresh, and hides half of it), withholds
(answers with nothing, or not at all) or floods (lists 512 records that there are not).

Columns: shards and the share of the swarm that a view has; calls to holders that write and that
read, for each server and minute; bytes sent and received by a server in a second, where a call
between two counts at both; the time from a crash until a reader's view lacks the server; servers
that live and are not in a view where they should be.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.directory_sim_world import (
    CHANGE_S,
    DOUBLING_S,
    FLOOD,
    READERS,
    STALE,
    TRUTHFUL,
    WITHHOLD,
    Settings,
    World,
)
from benchmarks.report import describe_machine, write_results
from p2p.holder_choice import HOLDERS
from p2p.shards import SHARDS_READ
from petald.move_planner import look_period_s

SIZES = (100, 300, 1000, 3000, 10_000)
QUICK_SIZES = (100, 300, 1000)
QUICK_READERS = 15
BUSY_S = 15.0
GROWTH = (100, 3000)
QUICK_GROWTH = (60, 240)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One row.

    Attributes:
        bytes_per_s: by server that is not hostile, sent and received; median, 99 of 100, worst.
        crash_s: until a reader lost a crashed server; median, worst.
        unseen: part of the servers that should be in a view and are not.
        kept: pairs of a reader and a crashed server that it still saw at the end.
    """

    servers: int
    hostile: str
    change_s: float
    level: int
    share: float
    put_bytes: int
    beat_bytes: int
    writes_per_minute: float
    reads_per_minute: float
    bytes_per_s: tuple[float, float, float]
    crash_s: tuple[float, float]
    unseen: float
    kept: int
    grows: bool
    took_s: float


def simulate(settings: Settings) -> Result:
    began_at = time.perf_counter()
    world = World(settings)
    world.run()
    counted_s = settings.end_s - settings.begin_s
    alive = [server for server in world.servers if server.is_alive]
    watching = {reader.server for reader in world.readers}
    level = world.deepest
    if settings.grows_from is None:
        level = round(statistics.median(one.memory.sample.level for one in world.readers))
    rates = sorted(server.traffic.bytes / counted_s for server in alive if not server.is_hostile)
    lost_s = [seconds for reader in world.readers for seconds in reader.lost_s.values()]
    return Result(
        servers=settings.servers,
        hostile=settings.hostile,
        change_s=settings.change_s,
        level=level,
        share=min(1.0, SHARDS_READ / (1 << level)),
        put_bytes=world.sizes.put,
        beat_bytes=world.sizes.beat,
        writes_per_minute=statistics.median(one.traffic.writes for one in alive) * 60 / counted_s,
        reads_per_minute=statistics.mean(one.traffic.reads for one in watching) * 60 / counted_s,
        bytes_per_s=(
            statistics.median(rates),
            rates[round(0.99 * (len(rates) - 1))],
            rates[-1],
        ),
        crash_s=(statistics.median(lost_s), max(lost_s)) if lost_s else (0.0, 0.0),
        unseen=world.unseen["unseen"] / max(1, world.unseen["all"]),
        kept=sum(
            peer in reader.seen
            for reader in world.readers
            for peer in world.crashed_at
            if reader.server.is_alive
        ),
        grows=settings.grows_from is not None,
        took_s=time.perf_counter() - began_at,
    )


def grow_and_shrink(first: int, most: int, *, seed: int) -> Settings:
    """A swarm that grows and shrinks again, as fast as the levels follow."""
    begin_s = 60.0
    grows_s = DOUBLING_S * math.log2(most / first)
    return Settings(
        servers=most,
        grows_from=first,
        readers=40,
        seed=seed,
        begin_s=begin_s,
        end_s=2 * (begin_s + grows_s) + 60.0,
    )


def one_key_cost(servers: int) -> tuple[float, float]:
    """Bytes a second with all records under one key, read whole from each holder at each look.

    Returns:
        For a server that holds nothing, and for one of the holders.
    """
    sizes = World(Settings(servers=1, readers=1)).sizes
    look_s = look_period_s(servers)
    read = sizes.whole_read(servers) / look_s
    write = (sizes.put + sizes.ok) / 15.0
    return HOLDERS * (read + write), servers * (read + write)


def print_table(results: Sequence[Result]) -> None:
    print(
        f"{'servers':>7} {'hostile':>8} {'shards':>6} {'share':>6} {'writes':>7} {'reads':>6}"
        f" {'kB/s: median':>13} {'99%':>6} {'worst':>7} {'crash: median':>14} {'worst':>6}"
        f" {'unseen':>7} {'kept':>4} {'took':>5}"
    )
    for one in results:
        median, most, worst = (rate / 1e3 for rate in one.bytes_per_s)
        busy = " *" if one.change_s == BUSY_S else " +" if one.grows else ""
        print(
            f"{one.servers:7} {one.hostile:>8} {2**one.level:6} {one.share:6.3f}"
            f" {one.writes_per_minute:5.0f}/m {one.reads_per_minute:4.0f}/m"
            f" {median:13.2f} {most:6.1f} {worst:7.1f} {one.crash_s[0]:12.0f} s"
            f" {one.crash_s[1]:4.0f} s {one.unseen:7.2%} {one.kept:4} {one.took_s:3.0f} s{busy}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--quick", action="store_true", help="at most 1,000 servers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--change-s",
        type=float,
        default=CHANGE_S,
        help="mean time until one says something else",
    )
    args = parser.parse_args()
    machine = describe_machine()
    print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    sizes = QUICK_SIZES if args.quick else SIZES
    readers = QUICK_READERS if args.quick else READERS
    common = Settings(servers=0, seed=args.seed, change_s=args.change_s, readers=readers)
    plan = [
        replace(common, servers=servers, hostile=hostile)
        for servers in sizes
        for hostile in (TRUTHFUL, STALE, WITHHOLD, FLOOD)
        if hostile == TRUTHFUL or servers in (100, sizes[-1])
    ]
    plan.append(replace(common, servers=sizes[-1], change_s=BUSY_S))
    growth = grow_and_shrink(*(QUICK_GROWTH if args.quick else GROWTH), seed=args.seed)
    plan.append(replace(growth, readers=min(growth.readers, readers)))
    results = []
    for settings in plan:
        results.append(simulate(settings))
        print(f"  {settings.servers} servers, {settings.hostile}: {results[-1].took_s:.0f} s")
    first = results[0]
    print(f"\nannouncement: {first.put_bytes} bytes whole, {first.beat_bytes} as a beat\n")
    print_table(results)
    print(f"\n*: each announcement says something else; otherwise one in {args.change_s:.0f} s")
    print(f"+: grows to this size, doubling every {DOUBLING_S:.0f} s, and shrinks again")
    print("\none key, all of it read whole from each of its holders (calculated):")
    for servers in sizes:
        reader, holder = one_key_cost(servers)
        print(f"{servers:7} servers: {reader / 1e3:9.1f} kB/s each, {holder / 1e3:11.0f} a holder")
    one_key = {servers: one_key_cost(servers) for servers in sizes}
    write_results(
        "directory_sim",
        machine,
        args,
        {"rows": [asdict(one) for one in results], "one_key": one_key},
    )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
