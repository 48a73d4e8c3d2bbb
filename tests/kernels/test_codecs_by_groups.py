"""The codecs whose values share scales by groups: how large they are, and by how much they err.

Shapes: S rows, D hidden size.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.codecs import dynamic8, int8, plain
from kernels.codecs.dynamic8 import dynamic_map
from kernels.codecs.groups import read_numbers
from kernels.codecs.registry import find_codec

BFLOAT16 = torch.bfloat16


def make_uneven(seed: int, count: int, width: int, spread: float) -> torch.Tensor:
    """Values over many powers of ten, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = spread * torch.randn(count, width, generator=generator)
    return torch.randn(count, width, generator=generator) * 10**sizes


def largest_of_group(rows_SD: torch.Tensor, group_values: int) -> torch.Tensor:
    """For each value the largest of its group, ``[S, D]``."""
    parts = rows_SD.abs().split(group_values, dim=1)
    return torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in parts], dim=1)


uneven = st.builds(
    make_uneven,
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(1, 300),
    st.floats(0, 4),
)


@pytest.mark.parametrize(
    ("name", "most"),
    [("int8", 0.52), ("dynamic8", 0.51), ("hadamard5", 0.365), ("hadamard4", 0.30)],
)
@pytest.mark.parametrize("width", [576, 2048, 4096, 5120, 8192])
def test_rows_are_as_small_as_claimed(name: str, most: float, width: int) -> None:
    assert find_codec(name).row_bytes(width, BFLOAT16) <= most * 2 * width


@settings(max_examples=100, deadline=None)
@given(rows_SD=uneven)
def test_int8_errs_by_half_a_step_of_the_groups_largest(rows_SD: torch.Tensor) -> None:
    codec = find_codec("int8")
    decoded = codec.decode(codec.encode(rows_SD), rows_SD.shape[1], torch.float32)
    largest = largest_of_group(rows_SD, int8.GROUP_VALUES)
    # A scale is rounded to bfloat16; at the code 127 that is the half of a 256th of 127 steps.
    assert ((decoded - rows_SD).abs() <= largest / 127 * (0.5 + 2**-7)).all()


@settings(max_examples=100, deadline=None)
@given(rows_SD=uneven)
def test_dynamic8_keeps_the_leading_digit(rows_SD: torch.Tensor) -> None:
    codec = find_codec("dynamic8")
    decoded = codec.decode(codec.encode(rows_SD), rows_SD.shape[1], torch.float32)
    part = rows_SD / largest_of_group(rows_SD, dynamic8.GROUP_VALUES)
    for decade in range(7):
        inside = (part.abs() > 0.1 * 10.0**-decade) & (part.abs() <= 10.0**-decade)
        relative = ((decoded - rows_SD) / rows_SD).abs()[inside]
        # Half a step of a decade that is cut in 2**(6 - decade); and what the scale loses.
        bound = 0.5 * 9 / 2 ** (6 - decade) + 2**-7
        assert (relative <= bound).all()


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


def test_the_dynamic_map_is_as_described() -> None:
    values = dynamic_map()
    assert len(values.unique()) == 256
    assert torch.equal(values, values.sort().values)
    assert {0.0, 1.0} <= set(values.tolist())
    inside = values[(values != 0) & (values != 1)]
    assert torch.equal(inside, -inside.flip(0))
    for decade in range(7):
        low, high = 0.1 * 10.0**-decade, 10.0**-decade
        assert int(((inside > low) & (inside < high)).sum()) == 2 ** (6 - decade)


@settings(max_examples=50, deadline=None)
@given(rows_SD=uneven)
def test_dynamic8_takes_the_nearest_of_its_map(rows_SD: torch.Tensor) -> None:
    codec = find_codec("dynamic8")
    data = codec.encode(rows_SD)
    decoded = codec.decode(data, rows_SD.shape[1], torch.float32)
    groups = -(-rows_SD.shape[1] // dynamic8.GROUP_VALUES)
    scale_SG = read_numbers(data, 0, groups).float()
    scale_SD = scale_SG.repeat_interleave(dynamic8.GROUP_VALUES, dim=1)[:, : rows_SD.shape[1]]
    best = (dynamic_map() * scale_SD[:, :, None] - rows_SD[:, :, None]).abs().amin(dim=2)
    # Between two that are as near in float16, rounding decides.
    assert ((decoded - rows_SD).abs() <= best + 2.0**-10 * rows_SD.abs() + 1e-7 * scale_SD).all()


@settings(max_examples=30, deadline=None)
@given(rows_SD=uneven)
def test_the_fast_way_gives_the_bytes_of_the_plain_one(rows_SD: torch.Tensor) -> None:
    for name, encode in (("int8", plain.encode_int8), ("dynamic8", plain.encode_dynamic8)):
        data = find_codec(name).encode(rows_SD)
        assert [bytes(row.tolist()) for row in data] == [encode(row_D) for row_D in rows_SD]
