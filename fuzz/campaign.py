"""Runs a harness: for a while on made-up input, or once over its corpus.

A harness is a module with `check(data)`, which raises AssertionError where its invariant does not
hold, and a corpus of a few inputs in ``corpus/NAME/``. With atheris installed, the input is guided
by coverage; without it, hypothesis mutates the corpus and shrinks what it finds.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Check = Callable[[bytes], None]

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES_PER_ROUND = 500
MAX_INPUT_BYTES = 4096


def seeds_of(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutations_of(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Seeds with pieces replaced, removed, repeated or put in from others; and plain bytes."""
    piece = st.one_of(
        st.binary(max_size=16),
        st.sampled_from([b"\xff" * 4, b"\x00" * 4, b"\x80", b"\xc0", b"\xdd\xff\xff\xff\xff"]),
        st.sampled_from(seeds),
    )
    edit = st.tuples(st.integers(0, MAX_INPUT_BYTES), st.integers(0, 64), piece)

    def mutate(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        for place, removed, inserted in edits:
            place %= len(seed) + 1
            seed = seed[:place] + inserted + seed[place + removed :]
        return seed[:MAX_INPUT_BYTES]

    mutated = st.builds(mutate, st.sampled_from(seeds), st.lists(edit, max_size=6))
    return st.one_of(mutated, st.binary(max_size=512))


def attack_for(check: Check, name: str, seconds: float) -> int:
    """Checks random inputs until the time is over; gives how many."""
    checked = 0
    ends_at = time.monotonic() + seconds

    def attack(data: bytes) -> None:
        nonlocal checked
        checked += 1
        check(data)

    attack_some = settings(
        max_examples=EXAMPLES_PER_ROUND,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(given(mutations_of(seeds_of(name)))(attack))
    while time.monotonic() < ends_at:
        attack_some()
    return checked


def main(check: Check, name: str) -> None:
    parser = argparse.ArgumentParser(description=f"Attacks what fuzz/{name}.py checks.")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    seeds = seeds_of(name)
    for seed in seeds:
        check(seed)
    if importlib.util.find_spec("atheris") is not None:
        _attack_guided(check, name, options.seconds)
    else:
        random.seed()
        checked = attack_for(check, name, options.seconds)
        print(f"{name}: {len(seeds)} seeds and {checked} inputs, nothing found")


def _attack_guided(check: Check, name: str, seconds: float) -> None:
    import atheris

    flags = [f"-max_total_time={seconds:.0f}", f"-max_len={MAX_INPUT_BYTES}", "-rss_limit_mb=1024"]
    atheris.instrument_all()
    # The last folder is only read: what is found there beyond the corpus stays in memory.
    atheris.Setup([sys.argv[0], *flags, str(CORPUS / name)], check)
    atheris.Fuzz()
