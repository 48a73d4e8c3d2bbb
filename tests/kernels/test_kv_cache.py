"""The arena: what is promised can be had, and nobody's tokens are ever another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import CacheFull
from kernels.extents import Extent, ExtentAllocator
from kernels.kv_cache import GRANULE_TOKENS, CacheArena, SequenceCache
from kernels.model_config import ModelConfig, parse_model_config

CPU = torch.device("cpu")


def make_config() -> ModelConfig:
    return parse_model_config(
        {
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 4,
        }
    )


def make_arena(capacity_tokens: int) -> CacheArena:
    return CacheArena(
        make_config(), blocks=2, capacity_tokens=capacity_tokens, dtype=torch.float32, device=CPU
    )


def write(arena: CacheArena, sequence: SequenceCache, values: list[int]) -> None:
    """What a step does: reserve, write behind the length, commit."""
    extent = sequence.reserve(sequence.length + len(values))
    begin = extent.offset + sequence.length
    for cache in (*arena.keys_KTH, *arena.values_KTH):
        cache[:, begin : begin + len(values)] = torch.tensor(values).float()[None, :, None]
    sequence.length += len(values)


def read(arena: CacheArena, sequence: SequenceCache) -> list[int]:
    extent = sequence.extent or Extent(0, 0)
    rows = slice(extent.offset, extent.offset + sequence.length)
    found = [cache[0, rows, 0].tolist() for cache in (*arena.keys_KTH, *arena.values_KTH)]
    assert all(one == found[0] for one in found)
    return [int(value) for value in found[0]]


@st.composite
def capacities(draw: st.DrawFn) -> int:
    return draw(st.integers(1, 40))


@given(capacities(), st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60))
def test_extents_never_overlap_and_fill_the_arena(
    capacity: int, actions: list[tuple[bool, int]]
) -> None:
    allocator = ExtentAllocator(capacity, granule=1)
    held: list[Extent] = []
    for is_allocation, number in actions:
        if is_allocation:
            extent = allocator.allocate(allocator.round_up(number))
            if extent is not None:
                held.append(extent)
        elif held:
            allocator.release(held.pop(number % len(held)))
        taken = [position for e in held for position in range(e.offset, e.end)]
        assert len(taken) == len(set(taken))
        assert all(0 <= position < capacity for position in taken)
    for extent in held:
        allocator.release(extent)
    whole = 1 << (capacity.bit_length() - 1)
    assert allocator.allocate(whole) == Extent(0, whole)


@given(capacities(), st.lists(st.integers(1, 40), max_size=12))
def test_packing_loses_no_room(capacity: int, sizes: list[int]) -> None:
    allocator = ExtentAllocator(capacity, granule=1)
    rounded = [allocator.round_up(size) for size in sizes]
    packed = allocator.pack(rounded)
    largest = 1 << (capacity.bit_length() - 1)
    if packed is None:
        # Powers of two that fit in number and in size always pack.
        assert sum(rounded) > capacity or max(rounded) > largest
    else:
        taken = [position for e in packed for position in range(e.offset, e.end)]
        assert len(taken) == len(set(taken)) == sum(rounded)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 13),
    st.lists(
        st.tuples(
            st.sampled_from(["open", "write", "truncate", "close"]),
            st.integers(0, 7),
            st.integers(1, 400),
        ),
        max_size=40,
    ),
)
def test_every_sequence_reads_what_it_wrote_whatever_the_others_do(
    granules: int, actions: list[tuple[str, int, int]]
) -> None:
    arena = make_arena(granules * GRANULE_TOKENS)
    model: dict[SequenceCache, list[int]] = {}
    counter = 0
    for action, which, number in actions:
        sequence = list(model)[which % len(model)] if model else None
        if action == "open":
            try:
                model[arena.open(number)] = []
            except CacheFull:
                assert number > 0
        elif sequence is None:
            continue
        elif action == "write":
            # Promised room can always be had.
            count = min(number, sequence.max_tokens - sequence.length)
            values = list(range(counter, counter + count))
            counter += count
            write(arena, sequence, values)
            model[sequence] += values
        elif action == "truncate":
            sequence.truncate(number)
            del model[sequence][number:]
        else:
            sequence.close()
            del model[sequence]
        for one, values in model.items():
            assert read(arena, one) == values
        assert arena.used_tokens == sum(map(len, model.values()))
    for one in model:
        one.close()
    assert arena.free_tokens == arena.capacity_tokens
    assert arena.statistics().sequences == 0


def test_packing_is_taken_when_free_room_is_scattered() -> None:
    arena = make_arena(8 * GRANULE_TOKENS)
    small = [arena.open(GRANULE_TOKENS) for _ in range(8)]
    for index, sequence in enumerate(small):
        write(arena, sequence, [index] * GRANULE_TOKENS)
    for index in (0, 2, 4, 6):
        small[index].close()
    large = arena.open(4 * GRANULE_TOKENS)
    write(arena, large, [99] * (4 * GRANULE_TOKENS))
    assert arena.statistics().packings == 1
    assert [read(arena, small[index])[0] for index in (1, 3, 5, 7)] == [1, 3, 5, 7]


def test_a_growing_sequence_moves_seldom() -> None:
    arena = make_arena(64 * GRANULE_TOKENS)
    sequence = arena.open(32 * GRANULE_TOKENS)
    for value in range(32 * GRANULE_TOKENS):
        write(arena, sequence, [value])
    assert arena.statistics().moves == 5
    assert read(arena, sequence) == list(range(32 * GRANULE_TOKENS))


def test_more_than_promised_is_refused_and_changes_nothing() -> None:
    arena = make_arena(4 * GRANULE_TOKENS)
    sequence = arena.open(10)
    write(arena, sequence, [1] * 10)
    with pytest.raises(CacheFull, match="opened for 10"):
        sequence.reserve(11)
    assert sequence.length == 10


def test_room_is_given_back_once() -> None:
    arena = make_arena(4 * GRANULE_TOKENS)
    sequence = arena.open(GRANULE_TOKENS)
    sequence.close()
    sequence.close()
    assert arena.free_tokens == arena.capacity_tokens
    with pytest.raises(CacheFull, match="closed"):
        sequence.reserve(1)


@pytest.mark.parametrize("max_tokens", [0, -1, 5 * GRANULE_TOKENS, 2**40])
def test_what_cannot_be_promised_is_refused(max_tokens: int) -> None:
    arena = make_arena(4 * GRANULE_TOKENS)
    with pytest.raises(CacheFull):
        arena.open(max_tokens)
    assert arena.free_tokens == arena.capacity_tokens
