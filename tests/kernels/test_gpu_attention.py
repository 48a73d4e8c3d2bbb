"""Attention of decode steps on a GPU, by a kernel that takes all sequences at once.

Against the plain way in float64, on memory that is not a number wherever no sequence lies.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import block as block_module
from kernels.checkpoint import Checkpoint
from kernels.decode_kernel import DecodeKernel, find_decode_kernel
from kernels.kv_cache import CacheArena, SequenceCache
from kernels.span import Segment, load_span
from kernels.step_graphs import CudaRecorder
from tests.helpers.decode_cases import DecodeCase, attend_in_turn, errors_of, make_case
from tests.helpers.gpu import GPU, error_of, needs_gpu
from tests.helpers.tiny_models import make_model, save_model

pytestmark = needs_gpu

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Of the error of any row: of a few roundings of weights and outputs; a wrong token makes more."""

SHAPES = [
    # heads, kv_heads, head_size, dtype
    (32, 8, 128, torch.bfloat16),
    (32, 8, 128, torch.float16),
    (32, 8, 128, torch.float32),
    (32, 32, 64, torch.bfloat16),
    (12, 4, 96, torch.float16),
    (12, 4, 96, torch.float32),
    (8, 2, 256, torch.bfloat16),
    (8, 2, 256, torch.float32),
    (71, 1, 64, torch.bfloat16),
    (71, 1, 64, torch.float32),
    (6, 2, 10, torch.bfloat16),
    (3, 3, 1, torch.float32),
    (14, 2, 80, torch.float16),
]


def find(dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> DecodeKernel:
    kernel = find_decode_kernel(GPU, dtype, heads, kv_heads, head_size)
    assert kernel is not None
    return kernel


def draw_lengths(rng: random.Random) -> list[int]:
    rows = rng.choice([1, 2, rng.randint(3, 16), rng.randint(17, 40)])
    return [rng.choice([0, 1, rng.randint(1, 100), rng.randint(1, 5000)]) for _ in range(rows)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_size", "dtype"), SHAPES)
def test_of_many_lengths(heads: int, kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
    kernel = find(dtype, heads, kv_heads, head_size)
    rng = random.Random(head_size)
    worst = 0.0
    for seed in range(5):
        lengths = draw_lengths(rng) if seed else [1, 63, 64, 65, 4095, 4096, 0]
        case = make_case(
            lengths,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            dtype=dtype,
            device=GPU,
            window=(0, 0, 1, 100, 1024)[seed],
            scale=(None, 0.2)[seed % 2],
            gap=rng.choice([0, 1, 7]),
            seed=seed,
        )
        worst = max(worst, errors_of(kernel, case))
    print(f"{heads} {kv_heads} {head_size} {dtype}: error {worst:.2g}")
    assert worst < BOUNDS[dtype]


def test_torch_is_not_much_nearer() -> None:
    dtype = torch.bfloat16
    kernel = find(dtype, 32, 8, 128)
    case = make_case(
        [5000, 300, 1, 77], heads=32, kv_heads=8, head_size=128, dtype=dtype, device=GPU
    )
    ours, plain = errors_of(kernel, case), errors_of(attend_in_turn, case)
    print(f"error of ours {ours:.2g}, torch's own {plain:.2g}")
    assert ours < 3 * plain


def test_far_into_a_large_arena() -> None:
    """Beyond what 32 bits count, in values."""
    kernel = find(torch.float16, 8, 8, 128)
    tokens, offset, length = 2_200_000, 2_199_000, 500
    cache_KTH = tuple(
        torch.empty(8, tokens, 128, dtype=torch.float16, device=GPU) for _ in range(2)
    )
    small = make_case(
        [length], heads=8, kv_heads=8, head_size=128, dtype=torch.float16, device=GPU, gap=0
    )
    for part_KTH, small_KTH in zip(cache_KTH, small.cache_KTH, strict=True):
        part_KTH[:, offset : offset + length] = small_KTH[:, :length]
    places_2S = torch.tensor([[offset], [length]], device=GPU)
    output_SA = kernel(small.projected, (cache_KTH[0], cache_KTH[1]), places_2S, None, 0)
    expected_SA = attend_in_turn(small.projected, small.cache_KTH, small.places_2S, None, 0)
    assert error_of(output_SA, expected_SA) < 2e-3
    assert torch.equal(cache_KTH[1][:, offset + length], small.projected[2][0])


def test_what_there_is_no_kernel_for() -> None:
    assert find_decode_kernel(GPU, torch.float64, 8, 8, 64) is None
    assert find_decode_kernel(GPU, torch.bfloat16, 8, 8, 512) is None
    assert find_decode_kernel(GPU, torch.bfloat16, 128, 1, 256) is None
    assert find_decode_kernel(torch.device("cpu"), torch.bfloat16, 8, 8, 64) is None


class Counted:
    """The kernel, which counts rows; called only where a step is not replayed."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def find(self, *about: Any) -> DecodeKernel | None:
        kernel = find_decode_kernel(*about)
        if kernel is None:
            return None

        def counted(projected: Any, *rest: Any) -> torch.Tensor:
            self.rows.append(projected[0].shape[0])
            return kernel(projected, *rest)

        return counted


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(block_module, "find_decode_kernel", counted.find)
    return counted


class Sessions:
    """Sessions of one span, each with its own rows; all is checked against a processor's."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, capacity: int) -> None:
        end = checkpoint.config.num_blocks
        self.span = load_span(checkpoint, 0, end, dtype=dtype, device=GPU)
        self.plain = load_span(checkpoint, 0, end, dtype=torch.float32, device=torch.device("cpu"))
        self.arena = CacheArena(
            self.span.config, blocks=end, capacity_tokens=capacity, dtype=dtype, device=GPU
        )
        for cache_KTH in (*self.arena.keys_KTH, *self.arena.values_KTH):
            cache_KTH.fill_(torch.nan)
        self.caches: list[SequenceCache] = []
        self.rows: list[torch.Tensor] = []
        self.outputs: list[list[torch.Tensor]] = []

    def open(self, tokens: int) -> int:
        number = len(self.caches)
        generator = torch.Generator().manual_seed(number)
        width = self.span.config.hidden_size
        self.caches.append(self.arena.open(tokens))
        self.rows.append(torch.randn(tokens, width, generator=generator))
        self.outputs.append([])
        return number

    def step(self, tokens: dict[int, int]) -> None:
        rows, segments = [], []
        for number, count in tokens.items():
            at = self.caches[number].length
            rows.append(self.rows[number][at : at + count])
            segments.append(Segment(self.caches[number], count))
        rows_SD = torch.cat(rows).to(GPU, self.span.dtype)
        made_SD = self.span.step(rows_SD, segments)
        for number, part_SD in zip(tokens, made_SD.split(list(tokens.values())), strict=True):
            self.outputs[number].append(part_SD)

    def error(self) -> float:
        errors = []
        for rows_SD, outputs in zip(self.rows, self.outputs, strict=True):
            made_SD = torch.cat(outputs)
            with torch.inference_mode():
                expected_SD = self.plain.forward(rows_SD[None, : len(made_SD)])[0]
            errors.append(error_of(made_SD, expected_SD))
        return max(errors)


def checkpoint_of(folder: Path, name: str = "llama", **changes: int) -> Checkpoint:
    return Checkpoint(save_model(make_model(name, **changes), folder))


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-window", "mistral-window", "falcon"])
def test_sessions_in_batches_give_what_each_gives_alone(
    tmp_path: Path, counted: Counted, name: str, is_recorded: bool
) -> None:
    sessions = Sessions(checkpoint_of(tmp_path, name), torch.float32, 64 * 64)
    if is_recorded:
        assert sessions.span.record_steps(CudaRecorder(GPU))
    rng = random.Random(1)
    going = [sessions.open(250) for _ in range(9)]
    for number in going:
        sessions.step({number: rng.randint(1, 150)})
    for turn in range(60):
        chosen = rng.sample(going, rng.randint(1, 9))
        counts = dict.fromkeys(chosen, 1)
        if turn % 10 == 5:  # one of them brings several
            counts[chosen[0]] = 3
        sessions.step(counts)
    assert sessions.arena.statistics().moves
    assert sessions.span.graphs_failure == ""
    assert sessions.error() < 1e-4
    assert set(counted.rows) >= (set(range(1, 10)) if is_recorded else set(range(2, 10)))
    assert (1 in counted.rows) == is_recorded


def test_in_more_rows_than_are_recorded(tmp_path: Path, counted: Counted) -> None:
    sessions = Sessions(checkpoint_of(tmp_path), torch.float32, 64 * 40)
    sessions.span.record_steps(CudaRecorder(GPU))
    for _ in range(40):
        sessions.open(64)
    for number in range(40):
        sessions.step({number: 1 + number})
    for _ in range(5):
        sessions.step(dict.fromkeys(range(40), 1))
    assert sessions.error() < 1e-4
    assert counted.rows.count(40) == 5 * 4


def test_after_caches_moved_and_were_packed_anew(tmp_path: Path, counted: Counted) -> None:
    sessions = Sessions(checkpoint_of(tmp_path), torch.float32, 448)
    sessions.span.record_steps(CudaRecorder(GPU))
    lengths = {sessions.open(tokens): tokens for tokens in (64, 192, 128)}
    for step in range(190):
        if step == 64:
            sessions.caches[0].close()
            del lengths[0]
        counts = {number: 1 for number, most in lengths.items() if step < most}
        if counts:
            sessions.step(counts)
    assert sessions.arena.statistics().moves
    assert sessions.error() < 1e-4
    assert counted.rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recorded_steps_of_sixteen_bits(
    tmp_path: Path, counted: Counted, dtype: torch.dtype
) -> None:
    checkpoint = checkpoint_of(
        tmp_path, hidden_size=256, num_attention_heads=8, num_key_value_heads=2
    )
    sessions = Sessions(checkpoint, dtype, 4096)
    sessions.span.record_steps(CudaRecorder(GPU))
    for _ in range(6):
        sessions.open(300)
    for number in range(6):
        sessions.step({number: 20 + 40 * number})
    for _ in range(50):
        sessions.step(dict.fromkeys(range(6), 1))
    error = sessions.error()
    print(f"{dtype}: error {error:.2g}")
    assert error < 0.03
    assert 6 in counted.rows
    assert sessions.span.graphs_failure == ""


def test_one_recording_serves_any_lengths() -> None:
    kernel = find(torch.bfloat16, 32, 8, 128)

    def make(lengths: list[int], seed: int) -> DecodeCase:
        return make_case(
            lengths,
            heads=32,
            kv_heads=8,
            head_size=128,
            dtype=torch.bfloat16,
            device=GPU,
            seed=seed,
        )

    case = make([6000, 6000], 0)
    output_SA = torch.zeros(2, 32 * 128, dtype=torch.bfloat16, device=GPU)

    def work() -> None:
        output_SA.copy_(kernel(case.projected, case.cache_KTH, case.places_2S, None, 0))

    replay = CudaRecorder(GPU)(work)
    for seed, lengths in enumerate([[0, 5000], [4999, 64], [1, 2], [700, 1300]], start=1):
        other = make(lengths, seed)
        for kept_KTH, other_KTH in zip(case.cache_KTH, other.cache_KTH, strict=True):
            kept_KTH.fill_(torch.nan)
            kept_KTH[:, : other_KTH.shape[1]] = other_KTH
        for kept, made in zip(case.projected, other.projected, strict=True):
            kept.copy_(made)
        case.places_2S.copy_(other.places_2S)
        replay()
        wide = [part.double() for part in (*other.projected, *other.cache_KTH)]
        expected_SA = attend_in_turn(
            (wide[0], wide[1], wide[2]), (wide[3], wide[4]), other.places_2S, None, 0
        )
        assert error_of(output_SA, expected_SA) < BOUNDS[torch.bfloat16]
