"""Swarms of real processes, and the reference that they are held against."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from petalctl.client import Client
from petalctl.private_swarm import PrivateSwarm
from tests.helpers.real_model import real_model_folder

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "1, 2, 3, 5, 8, 13,",
)
NEW_TOKENS = 64


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The real small model, as a folder of its own, so that its name needs no store."""
    return real_model_folder()


@pytest.fixture(scope="session")
def expected_tokens(model_folder: Path) -> dict[str, list[int]]:
    """Hugging Face's greedy continuation of each prompt, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    eos = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=eos, pad_token_id=0
    )
    found = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs)
        found[prompt] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return found


@functools.cache
def even_spans(hops: int, blocks: int = 30) -> tuple[tuple[int, int], ...]:
    """The model's blocks in so many parts."""
    borders = [round(blocks * part / hops) for part in range(hops + 1)]
    return tuple(itertools.pairwise(borders))


@pytest.fixture(scope="module")
def swarm(model_folder: Path) -> Iterator[PrivateSwarm]:
    """Three servers that share the model, for tests that leave it as it was."""
    with PrivateSwarm(str(model_folder), spans=even_spans(3), threads=1) as swarm:
        yield swarm


@pytest.fixture
def client(swarm: PrivateSwarm) -> Iterator[Client]:
    """A connection to the daemon that routes."""
    with swarm.client() as client:
        yield client


@pytest.fixture(scope="session", autouse=True)
def quiet_progress() -> None:
    """Hugging Face's bars do not belong into a test's output."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def wait_until_free(swarm: PrivateSwarm, deadline_s: float = 20.0) -> None:
    """Until no server holds a session or a promise; fails when one keeps it."""
    ends_at = time.monotonic() + deadline_s
    for server in swarm.servers:
        if not server.is_running:
            continue
        with Client(server.socket) as own:
            while True:
                span = own.status().span
                assert span is not None
                if span.sessions == 0 and span.free_cache_tokens == span.cache_tokens:
                    break
                assert time.monotonic() < ends_at, f"{server} keeps {span.sessions} sessions"
                time.sleep(0.05)
