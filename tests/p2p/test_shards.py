"""Shards: who estimates nearly the same finds each other, at every size of the swarm."""

from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.shards import (
    MAX_LEVEL,
    SERVERS_PER_SHARD,
    SHARDS_READ,
    Sample,
    Shard,
    announced_keys,
    estimate_from_first_shard,
    estimate_servers,
    shard_index,
)

KEY = b"k" * 32


def digest_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:8]


def make_sample(number: int = 0) -> Sample:
    return Sample(digest_of(number))


@given(
    st.integers(0, 2**64 - 1),
    st.floats(0, math.log2(SERVERS_PER_SHARD) + MAX_LEVEL),
    st.floats(-0.499, 0.499),
)
def test_a_reader_finds_whoever_estimates_within_a_factor_of_the_root_of_two(number, size, error):
    digest = number.to_bytes(8)
    told = announced_keys(KEY, digest, 2 ** (size + error))
    assert len(told) <= 2
    level = max(0, min(math.floor(size - math.log2(SERVERS_PER_SHARD)), MAX_LEVEL))
    assert Shard(level, shard_index(digest, level)).key(KEY) in told


def test_a_small_swarm_has_the_models_own_key():
    for servers in (0, 1, SERVERS_PER_SHARD):
        assert announced_keys(KEY, digest_of(1), servers) == (KEY,)
    sample = make_sample()
    assert (sample.shards, sample.share) == ((Shard(0, 0),), 1.0)
    assert sample.shards[0].key(KEY) == KEY


def test_shards_of_a_level_have_keys_of_their_own():
    keys = {Shard(level, index).key(KEY) for level in range(8) for index in range(2**level)}
    assert len(keys) == 2**8 - 8  # the first of each level is the model's


@pytest.mark.parametrize("servers", [1, 30, 60, 100, 300, 1000, 10_000, 60_000])
def test_a_sample_finds_its_level_and_stays_there(servers):
    digests = [digest_of(number) for number in range(servers)]
    sample = make_sample()
    level = math.log2(servers / SERVERS_PER_SHARD)
    first = {digest for digest in digests if KEY in announced_keys(KEY, digest, servers)}
    rounds = 1
    is_settled = sample.on_read(first)
    while not is_settled:
        shards = sample.shards
        is_settled = sample.on_read(
            [digest for digest in digests if any(shard.holds(digest) for shard in shards)]
        )
        rounds += 1
    assert rounds <= 3
    assert sample.servers == pytest.approx(servers, rel=0.2)
    assert level - 1.2 <= sample.level <= max(0, level + 0.2)
    assert len(sample.shards) == min(SHARDS_READ, 2**sample.level)
    if sample.share == 1:
        assert sample.servers == servers


def test_all_who_are_in_a_sample_have_the_same_one():
    samples = [make_sample(number) for number in range(200)]
    for sample in samples:
        sample.level = 5
    groups = {frozenset(shard.index for shard in sample.shards) for sample in samples}
    assert sorted(map(sorted, groups)) == [list(range(at, at + 8)) for at in range(0, 32, 8)]
    for number, sample in enumerate(samples):
        assert holds(sample, digest_of(number))
        assert len(sample.shards) == SHARDS_READ


def test_a_sample_of_a_grown_swarm_is_a_part_of_the_one_before():
    sample = make_sample()
    held = None
    for level in range(3, 12):
        sample.level = level
        digests = {digest for digest in map(digest_of, range(4000)) if holds(sample, digest)}
        assert held is None or digests <= held
        held = digests


def holds(sample: Sample, digest: bytes) -> bool:
    return any(shard.holds(digest) for shard in sample.shards)


def test_a_level_is_kept_while_the_estimate_is_near_its_bounds():
    sample = make_sample()
    sample.servers, sample.level = 400.0, 3
    for servers, level in [(384, 3), (366, 3), (330, 2), (380, 2), (400, 2), (432, 3)]:
        digests = [bytes((number % 8 << 5, *bytes(7))) for number in range(servers)]
        sample.on_read(digests)
        assert sample.level == level, servers


def read_until_settled(sample: Sample, told: dict[bytes, set[bytes]]) -> set[bytes]:
    """One lookup that remembers nothing but the sample; gives what was found."""
    found: set[bytes] = set()
    sample.begin(is_anything_known=sample.servers is not None)
    for _ in range(4):
        shards = sample.shards
        found = set().union(*(told.get(shard.key(KEY), set()) for shard in shards))
        if sample.on_read(found):
            break
    return found


def announce(servers: int) -> dict[bytes, set[bytes]]:
    told: dict[bytes, set[bytes]] = {}
    for digest in map(digest_of, range(servers)):
        for key in announced_keys(KEY, digest, servers):
            told.setdefault(key, set()).add(digest)
    return told


@pytest.mark.parametrize("servers", [150, 300, 1000, 5000])
@pytest.mark.parametrize("number", range(6))
def test_a_reader_at_any_wrong_level_finds_the_right_one(servers, number):
    told = announce(servers)
    true_level = math.floor(math.log2(servers / SERVERS_PER_SHARD))
    for level in range(10):
        sample = make_sample(number)
        sample.servers, sample.level = 2.0**level * SERVERS_PER_SHARD, level
        for _ in range(2):
            found = read_until_settled(sample, told)
        assert abs(sample.level - true_level) <= 1, level
        assert len(found) > 0.7 * servers * sample.share, level


def test_a_reader_that_saw_nobody_for_a_while_finds_its_level_again():
    sample = make_sample()
    told = announce(1000)
    for _ in range(2):
        assert len(read_until_settled(sample, told)) > 400
        for _ in range(3):
            assert not read_until_settled(sample, {})


def test_a_reader_of_a_swarm_that_grew_unseen_finds_its_level():
    sample = make_sample()
    assert len(read_until_settled(sample, announce(40))) == 40
    assert len(read_until_settled(sample, announce(2000))) > 300


@pytest.mark.parametrize("zeros", [9, 13])
def test_identities_that_were_ground_do_not_drive_readers_to_an_empty_level(zeros):
    told = announce(1000)
    told[KEY] |= {(1 << (63 - zeros) | number).to_bytes(8) for number in range(40)}
    for number in range(8):
        sample = make_sample(number)
        assert len(read_until_settled(sample, told)) > 300
        assert sample.level == 4


def test_shards_whose_holders_lie_do_not_make_the_estimate():
    assert estimate_servers([60, 60, 512, 60, 0, 60, 60, 512], 4) == 960
    assert estimate_servers([7], 0) == 7
    assert estimate_servers([7, 512], 1) == 519


def test_the_first_shard_tells_how_many_there_are():
    for servers in (10, 90, 1000, 20_000):
        digests = [digest_of(number) for number in range(servers)]
        first = [digest for digest in digests if KEY in announced_keys(KEY, digest, servers)]
        assert len(first) <= 4 * SERVERS_PER_SHARD
        assert estimate_from_first_shard(first) == pytest.approx(servers, rel=0.4)
