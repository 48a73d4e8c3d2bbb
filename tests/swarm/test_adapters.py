"""Generations with adapters through real processes, against PEFT on the same weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from petalctl.client import Client
from petalctl.errors import JobError
from petalctl.private_swarm import PrivateSwarm
from tests.swarm.conftest import PROMPTS, even_spans, wait_until_free

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # likewise
]

NEW_TOKENS = 24
LORA = peft.LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]
)
SOFT_PROMPT = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10)


class Trained:
    """An adapter as PEFT saved it, and what PEFT's model makes of some prompts."""

    def __init__(self, model_folder: Path, folder: Path, config: peft.PeftConfig) -> None:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        model: Any = peft.get_peft_model(base, config).eval()
        with torch.no_grad():  # as if trained: what is fresh does nothing, or little
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder)
        self.folder = folder
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        eos = base.generation_config.eos_token_id
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=eos, pad_token_id=0
        )
        self.expected: dict[str, list[int]] = {}
        for prompt in PROMPTS[:3]:
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, generation_config=greedy)
            self.expected[prompt] = output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def lora(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(model_folder, tmp_path_factory.mktemp("lora"), LORA)


@pytest.fixture(scope="module")
def soft_prompt(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(model_folder, tmp_path_factory.mktemp("soft"), SOFT_PROMPT)


@pytest.fixture(scope="module")
def twin_swarm(model_folder: Path, lora: Trained) -> Iterator[PrivateSwarm]:
    """Two servers for each part of the model, all of which host the LoRA."""
    serve = {"adapters": [f"poet={lora.folder}"]}
    with PrivateSwarm(str(model_folder), even_spans(2) * 2, threads=1, serve=serve) as swarm:
        yield swarm


def generate(client: Client, prompt: str, adapter: str | Path) -> list[int]:
    job = client.generate(prompt=prompt, max_new_tokens=NEW_TOKENS, adapter=adapter)
    return list(job.result().tokens)


@pytest.mark.parametrize("kind", ["lora", "soft_prompt"])
def test_tokens_equal_pefts(
    twin_swarm: PrivateSwarm,
    kind: str,
    expected_tokens: dict[str, list[int]],
    request: pytest.FixtureRequest,
) -> None:
    trained: Trained = request.getfixturevalue(kind)
    plain = {prompt: expected_tokens[prompt][:NEW_TOKENS] for prompt in trained.expected}
    assert trained.expected != plain
    with twin_swarm.client() as client:
        for prompt, tokens in trained.expected.items():
            assert generate(client, prompt, trained.folder) == tokens
            assert generate(client, prompt, "") == plain[prompt]
    wait_until_free(twin_swarm)


def test_a_hosted_adapter_is_used_by_its_name(twin_swarm: PrivateSwarm, lora: Trained) -> None:
    with twin_swarm.client() as client:
        (model,) = client.swarm().models
        (full_name,) = {name for server in model.servers for name in server.adapters}
        assert full_name.startswith("poet@")
        for prompt, tokens in lora.expected.items():
            assert generate(client, prompt, "poet") == tokens
        assert generate(client, PROMPTS[0], full_name) == lora.expected[PROMPTS[0]]
        with pytest.raises(JobError, match="painter"):
            client.generate(prompt="x", adapter="painter", max_wait_s=0).result()


def test_what_the_daemon_cannot_read_is_told(twin_swarm: PrivateSwarm, tmp_path: Path) -> None:
    with twin_swarm.client() as client:
        with pytest.raises(JobError, match=str(tmp_path)) as caught:
            generate(client, "x", tmp_path)
        assert caught.value.code == "bad_adapter"
        assert generate(client, PROMPTS[0], "")


def test_a_killed_hop_is_replaced_with_the_adapter(
    model_folder: Path, lora: Trained, tmp_path: Path
) -> None:
    prompt, tokens = next(iter(lora.expected.items()))
    with (
        PrivateSwarm(str(model_folder), even_spans(2) * 2, threads=1) as swarm,
        swarm.client() as client,
    ):
        peers = {}
        for server in swarm.servers:
            with Client(server.socket) as own:
                peers[own.status().peer] = server
        chains = []
        job = client.generate(
            prompt=prompt,
            max_new_tokens=NEW_TOKENS,
            adapter=lora.folder,
            on_progress=lambda told: chains.append(told.chain),
        )
        pieces = iter(job)
        for _ in range(3):
            next(pieces)
        os.kill(peers[chains[0][1].peer].pid, signal.SIGKILL)
        result = job.result()
        assert list(result.tokens) == tokens
        assert [(move.start, move.end) for move in result.moves] == [even_spans(2)[1]]
