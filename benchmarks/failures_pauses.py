"""The pause of one failure: a hop's process is killed or stopped in the middle of a generation.

Detection and rebuild are told apart: the gap between two tokens that a reader of the stream sees,
less a usual step, less the rebuild as petald reports it.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import statistics
import time
from dataclasses import dataclass

from benchmarks.failures_draw import HOPS, WISHES, Strike, match_moves
from benchmarks.failures_swarm import Bench, read_tokens
from petalctl.daemon_process import DaemonProcess

NEW_TOKENS = 40
STRUCK_TOKEN = 20
SETTLE_S = 1.0


@dataclass(frozen=True)
class Pause:
    """What one failure cost."""

    detection_ms: float
    rebuild_ms: float


def measure_pauses(bench: Bench, context: int, number: signal.Signals, trials: int) -> list[Pause]:
    return [measure_pause(bench, context, number, trial % HOPS) for trial in range(trials)]


def measure_pause(bench: Bench, context: int, number: signal.Signals, hop: int) -> Pause:
    generation = bench.client.generate(
        prompt_tokens=bench.prompt(context), max_new_tokens=NEW_TOKENS
    )
    times: list[float] = []
    strike: Strike | None = None
    struck_at = math.inf
    for _ in read_tokens(generation):
        times.append(time.perf_counter())
        if len(times) == STRUCK_TOKEN:
            strike = bench.place_strike(generation, STRUCK_TOKEN - 1, hop)
            os.kill(bench.servers[strike.peer].pid, number)
            struck_at = time.perf_counter()
    if strike is None:
        raise SystemExit(f"the model ended after {len(times)} tokens, before a hop was struck")
    moves = generation.result().moves
    if match_moves([strike], moves)[0]:
        raise SystemExit("a hop was killed or stopped, and no move shows it")
    gaps = [after - before for before, after in itertools.pairwise(times)]
    usual_s = statistics.median(gaps)
    pause_s = max(after - max(before, struck_at) for before, after in itertools.pairwise(times))
    rebuild_s = sum(move.pause_s for move in moves if move.reason not in WISHES)
    restore(bench, bench.servers[strike.peer])
    return Pause(1e3 * max(0.0, pause_s - usual_s - rebuild_s), 1e3 * rebuild_s)


def restore(bench: Bench, victim: DaemonProcess) -> None:
    if victim.is_running:
        os.kill(victim.pid, signal.SIGCONT)
    else:
        assert victim.span is not None
        bench.learn(bench.swarm.add_server(victim.span))
    time.sleep(SETTLE_S)


def print_pauses(context: int, kind: str, pauses: list[Pause]) -> None:
    for part in ("detection", "rebuild"):
        values = [getattr(pause, f"{part}_ms") for pause in pauses]
        print(
            f"{kind:8} after {context:5} tokens  {part:10} median {statistics.median(values):7.0f}"
            f" ms, worst {max(values):7.0f} ms   (n = {len(values)})",
            flush=True,
        )
