"""Generations with adapters of all kinds, from PEFT's files on disk to tokens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import trio

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from kernels.errors import BadAdapter
from kernels.peft_files import save_lora, save_prefix, save_soft_prompt
from kernels.span import load_span
from p2p.wire.control_messages import Progress
from petald.errors import BadRequest, ConfigError, MissingBlocks, PromptTooLong
from petald.hosted_adapters import place_adapters, read_adapters
from petald.job_adapter import NO_ADAPTER, AdapterFolders
from petald.router import RETRY_VIEW_AGE_S
from tests.helpers.daemon_world import open_daemon_world
from tests.helpers.tiny_models import make_model, save_model

LORA = AdapterForm(targets=("q_proj", "v_proj"), rank=2, scaling=1.5)
PREFIX = AdapterForm(prefix_tokens=6)
PROMPT = [5, 17, 3, 88, 42, 9]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("tiny")))


def make_values(checkpoint: Checkpoint, form: AdapterForm, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (checkpoint.config.num_blocks, row_elements(checkpoint.config, form))
    return 0.5 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
async def test_a_generation_with_an_adapter_equals_the_whole_model(
    checkpoint: Checkpoint, tmp_path: Path, kind: str
) -> None:
    form, save = (LORA, save_lora) if kind == "lora" else (PREFIX, save_prefix)
    values_LE = make_values(checkpoint, form)
    save(tmp_path, checkpoint.config, form, values_LE, base_model="tiny")
    whole = SpanAdapter(checkpoint.config, form, 0, values_LE)
    async with open_daemon_world(checkpoint, tmp_path, (0, 2), (2, 4)) as world:
        adapter = await AdapterFolders().find(str(tmp_path), world.identity)
        done, kept = await world.generate(PROMPT, 8, adapter=adapter)
        assert list(done.tokens) == world.expected_tokens(PROMPT, 8, adapters=(whole,))
        assert list(done.tokens) != world.expected_tokens(PROMPT, 8)
        assert kept.session.times_lent == 2
        await kept.session.close()


async def test_a_soft_prompt_stands_before_every_prompt(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    prompt_PD = 2 * torch.randn(150, 48, generator=torch.Generator().manual_seed(1))
    save_soft_prompt(tmp_path, checkpoint.config, prompt_PD, base_model="tiny")
    async with open_daemon_world(checkpoint, tmp_path, (0, 2), (2, 4)) as world:
        adapter = await AdapterFolders().find(str(tmp_path), world.identity)
        assert adapter.prompt_rows == 150
        done, kept = await world.generate(PROMPT, 6, adapter=adapter, session="chat")
        first = world.expected_tokens(PROMPT, 6, prompt_PD=prompt_PD)
        assert list(done.tokens) == first
        assert list(done.tokens) != world.expected_tokens(PROMPT, 6)
        assert done.prompt_tokens == done.timings.prefilled_tokens == len(PROMPT)
        prefill = [told for told in world.sent if isinstance(told, Progress) and told.total]
        assert prefill[-1].done == prefill[-1].total == 150 + len(PROMPT)

        longer = [*PROMPT, *first, 7, 8]
        done, again = await world.generate(longer, 4, adapter=adapter, kept=kept, session="chat")
        assert again is kept
        assert list(done.tokens) == world.expected_tokens(longer, 4, prompt_PD=prompt_PD)
        assert done.timings.prefilled_tokens == 3  # the last token that was made, and two new ones
        await kept.session.close()


async def test_a_kept_session_is_not_used_with_another_adapter(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders, whole = [tmp_path / "one", tmp_path / "two"], []
    for seed, folder in enumerate(folders):
        values_LE = make_values(checkpoint, LORA, seed)
        save_lora(folder, checkpoint.config, LORA, values_LE, base_model="")
        whole.append(SpanAdapter(checkpoint.config, LORA, 0, values_LE))
    async with open_daemon_world(checkpoint, tmp_path, (0, 4)) as world:
        reader = AdapterFolders()
        one, two = [await reader.find(str(folder), world.identity) for folder in folders]
        assert await reader.find(str(folders[0]), world.identity) is one
        _, kept = await world.generate(PROMPT, 3, adapter=one, session="chat")
        done, same = await world.generate(PROMPT, 3, adapter=one, kept=kept, session="chat")
        assert same is kept
        assert done.timings.prefilled_tokens == 1
        for adapter, adapters in ((two, (whole[1],)), (NO_ADAPTER, ()), (one, (whole[0],))):
            done, other = await world.generate(
                PROMPT, 3, adapter=adapter, kept=kept, session="chat"
            )
            assert other is not kept
            assert not kept.session.is_open
            assert done.timings.prefilled_tokens == len(PROMPT)
            assert list(done.tokens) == world.expected_tokens(PROMPT, 3, adapters=adapters)
            kept = other
        save_lora(folders[0], checkpoint.config, LORA, values_LE, base_model="")
        assert await reader.find(str(folders[0]), world.identity) is not one  # it was changed
        await kept.session.close()


async def test_what_is_no_adapter_of_the_model_is_told(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = Checkpoint(save_model(make_model("llama", num_hidden_layers=2), tmp_path / "other"))
    save_lora(tmp_path / "lora", other.config, LORA, make_values(other, LORA), base_model="")
    (tmp_path / "empty").mkdir()
    async with open_daemon_world(checkpoint, tmp_path, (0, 4)) as world:
        reader = AdapterFolders()
        for folder in ("lora", "empty", "missing"):
            with pytest.raises(BadAdapter, match=folder):
                await reader.find(str(tmp_path / folder), world.identity)
        with pytest.raises(BadRequest, match="absolute"):
            await reader.find("some/folder", world.identity)
        if os.geteuid():
            (tmp_path / "lora").chmod(0)
            with pytest.raises(BadAdapter, match="lora"):
                await reader.find(str(tmp_path / "lora"), world.identity)
            (tmp_path / "lora").chmod(0o700)


async def test_an_adapter_takes_of_the_models_positions(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    prompt_PD = torch.zeros(500, 48)
    save_soft_prompt(tmp_path, checkpoint.config, prompt_PD, base_model="")
    async with open_daemon_world(checkpoint, tmp_path, (0, 4)) as world:
        adapter = await AdapterFolders().find(str(tmp_path), world.identity)
        with pytest.raises(PromptTooLong, match="takes 12, beside the adapter's 500"):
            await world.generate(list(range(12)), 1, adapter=adapter)


@pytest.mark.parametrize("name", ["poet", "poet@1111111111111111"])
async def test_a_hosted_adapter_is_chosen_by_its_name(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    values_LE = make_values(checkpoint, LORA)
    whole = SpanAdapter(checkpoint.config, LORA, 0, values_LE)
    names = dict.fromkeys(("poet", "poet@1111111111111111"), whole)
    spans = [(0, 2), (2, 4), (0, 4), (2, 4)]
    async with open_daemon_world(checkpoint, tmp_path, *spans, hosted_adapters=names) as world:
        adapter = await AdapterFolders().find(name, world.identity)
        with pytest.raises(MissingBlocks, match="poet"):
            await world.generate(PROMPT, 4, adapter=adapter)
        full, other = "poet@1111111111111111", "poet@2222222222222222"
        await world.announce({0: (full,), 1: (full,), 3: (other,)})
        await trio.sleep(RETRY_VIEW_AGE_S)
        done, kept = await world.generate(PROMPT, 4, adapter=adapter)
        assert [hop.peer for hop in done.chain] == [
            network.peer for network in world.swarm.networks[:2]
        ]
        assert list(done.tokens) == world.expected_tokens(PROMPT, 4, adapters=(whole,))
        await kept.session.close()


async def test_a_host_that_has_something_else_by_now_is_left(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    whole = SpanAdapter(checkpoint.config, LORA, 0, make_values(checkpoint, LORA))
    full = "poet@1111111111111111"
    async with open_daemon_world(
        checkpoint, tmp_path, (0, 4), (0, 4), hosted_adapters={full: whole}
    ) as world:
        await world.announce({0: (full,), 1: (full,)})
        for store in world.swarm.stores[:1]:
            store.hosted = {"poet": whole, "poet@2222222222222222": whole}
        adapter = await AdapterFolders().find("poet", world.identity)
        done, kept = await world.generate(PROMPT, 2, adapter=adapter)
        assert [hop.peer for hop in done.chain] == [world.swarm.networks[1].peer]
        await kept.session.close()


def test_hosted_adapters_are_read_once_and_placed_in_parts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = checkpoint.config
    values_LE = make_values(checkpoint, LORA)
    save_lora(tmp_path / "a", config, LORA, values_LE, base_model="")
    save_lora(tmp_path / "b", config, LORA, -values_LE, base_model="")
    save_soft_prompt(tmp_path / "soft", config, torch.zeros(3, 48), base_model="")
    one, other = read_adapters([f"poet={tmp_path}/a", f"painter={tmp_path}/b"], config)
    assert (one.name, other.name) == ("poet", "painter")
    (again,) = read_adapters([f"poet={tmp_path}/b"], config)
    assert again.full_name.partition("@")[2] == other.full_name.partition("@")[2]
    assert again.full_name != one.full_name
    span = load_span(checkpoint, 1, 3, dtype=torch.float32, device=torch.device("cpu"))
    placed = place_adapters([one, other], span)
    assert set(placed) == {"poet", one.full_name, "painter", other.full_name}
    torch.testing.assert_close(placed["poet"].values_LE, values_LE[1:3])
    assert (placed["poet"].start, placed["poet"].end) == (1, 3)
    for text, problem in ((f"x={tmp_path}/soft", "soft prompt"), ("x=/nowhere", "/nowhere")):
        with pytest.raises(ConfigError, match=problem):
            read_adapters([text], config)
