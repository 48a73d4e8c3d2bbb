"""The fuzz harnesses over their corpus, and over a few hundred inputs more."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import HealthCheck, given, settings

from fuzz.campaign import CORPUS, mutations_of, seeds_of

HARNESSES = sorted(path.name for path in CORPUS.iterdir())


@pytest.mark.parametrize("name", HARNESSES)
def test_harness_finds_nothing_in_its_corpus(name):
    harness = importlib.import_module(f"fuzz.{name}")
    seeds = seeds_of(name)
    assert seeds
    for seed in seeds:
        harness.check(seed)


@pytest.mark.parametrize("name", HARNESSES)
def test_harness_finds_nothing_near_its_corpus(name):
    harness = importlib.import_module(f"fuzz.{name}")
    suppressed = list(HealthCheck)

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=suppressed)
    @given(mutations_of(seeds_of(name)))
    def attack(data):
        harness.check(data)

    attack()


def test_every_harness_has_a_corpus():
    harnesses = [path.stem for path in CORPUS.parent.glob("fuzz_*.py")]
    assert sorted(harnesses) == HARNESSES
