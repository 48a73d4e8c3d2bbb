"""Speeds on disk, and the measuring of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.checkpoint import Checkpoint
from kernels.kv_cache import CacheArena
from kernels.span import load_span
from petald.speed_cache import FILE_NAME, MAX_ENTRIES, SpeedCache, speed_key
from petald.throughput import BlockSpeed, measure_speed
from tests.helpers.tiny_models import make_model, save_model

SPEED = BlockSpeed(step_s=0.001, token_s=0.0001)
CPU = torch.device("cpu")


def test_what_was_put_is_there_for_the_next_start(tmp_path: Path) -> None:
    assert SpeedCache(tmp_path).get("a") is None
    SpeedCache(tmp_path).put("a", SPEED)
    assert SpeedCache(tmp_path).get("a") == SPEED
    assert SpeedCache(tmp_path).get("b") is None
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"step_s": 1.0, "token_s": -1.0}}',
        '{"a": {"step_s": "1", "token_s": 1.0}}',
        '{"a": {"step_s": NaN, "token_s": 1.0}}',
        "[" * 100_000,
    ],
)
def test_a_bad_file_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    cache = SpeedCache(tmp_path)
    assert cache.get("a") is None
    cache.put("a", SPEED)
    assert cache.get("a") == SPEED


def test_without_a_place_nothing_is_kept_and_nothing_fails(tmp_path: Path) -> None:
    cache = SpeedCache(tmp_path / "missing")
    cache.put("a", SPEED)
    assert cache.get("a") is None


def test_the_oldest_entries_go(tmp_path: Path) -> None:
    cache = SpeedCache(tmp_path)
    (tmp_path / FILE_NAME).write_text(json.dumps(dict.fromkeys(map(str, range(MAX_ENTRIES)), 1)))
    cache.put("new", SPEED)
    kept = json.loads((tmp_path / FILE_NAME).read_text())
    assert len(kept) == MAX_ENTRIES
    assert "0" not in kept
    assert "new" in kept


def test_a_key_depends_on_what_a_speed_does(tmp_path: Path) -> None:
    config = Checkpoint(save_model(make_model("llama"), tmp_path)).config
    options = {"device": CPU, "dtype": torch.float32, "quant": "none", "threads": 1}
    key = speed_key(config, **options)  # type: ignore[arg-type]
    assert key == speed_key(replace(config, num_blocks=7), **options)  # type: ignore[arg-type]
    for changes in ({"dtype": torch.bfloat16}, {"quant": "int8"}, {"threads": 2}):
        assert key != speed_key(config, **(options | changes))  # type: ignore[arg-type]
    wider = replace(config, ffn_size=config.ffn_size * 2)
    assert key != speed_key(wider, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity_tokens", [64, 4096])
def test_a_span_is_measured_by_the_block(tmp_path: Path, capacity_tokens: int) -> None:
    checkpoint = Checkpoint(save_model(make_model("llama"), tmp_path))
    span = load_span(checkpoint, 1, 4, dtype=torch.float32, device=CPU)
    arena = CacheArena(
        span.config, blocks=3, capacity_tokens=capacity_tokens, dtype=torch.float32, device=CPU
    )
    speed = measure_speed(span, arena)
    assert speed.step_s > 0
    assert speed.token_s > 0
    assert arena.free_tokens == capacity_tokens
