"""Reading checkpoints whose tensors are called otherwise than the family's usually are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from kernels.checkpoint import Checkpoint
from kernels.errors import CorruptCheckpoint
from kernels.head import load_ends
from kernels.span import load_span
from kernels.weight_names import linear_names
from tests.helpers.tiny_models import make_model, save_model

CPU = torch.device("cpu")


def outputs(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last block gives, and the logits."""
    checkpoint = Checkpoint(folder)
    ends = load_ends(checkpoint, dtype=torch.float32, device=CPU)
    blocks = checkpoint.config.num_blocks
    span = load_span(checkpoint, 0, blocks, dtype=torch.float32, device=CPU)
    hidden = span.forward(ends.embedding.embed(ids)[None])[0]
    return hidden, ends.head.logits(hidden)


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
def test_bloom_saved_without_its_head(tmp_path: Path, shard_size: str) -> None:
    model: Any = make_model("bloom")
    usual = save_model(model, tmp_path / "usual")
    model.transformer.save_pretrained(tmp_path / "hub", max_shard_size=shard_size)
    assert (tmp_path / "hub" / "model.safetensors.index.json").exists() == (shard_size == "60KB")
    ids = torch.arange(3, 30)
    for ours, expected in zip(outputs(tmp_path / "hub", ids), outputs(usual, ids), strict=True):
        assert torch.equal(ours, expected)


def test_the_language_model_within_gemma3(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = make_model("gemma3").config.to_dict() | {"sliding_window_pattern": 3}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision)
    model: Any = Gemma3ForConditionalGeneration(config).eval()
    folder = save_model(model, tmp_path)
    modules = dict(model.named_modules())
    assert all(name.format(block=1) in modules for name in linear_names(Checkpoint(folder).config))
    ids = torch.arange(3, 30)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(outputs(folder, ids)[1], expected, rtol=1e-4, atol=1e-4)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    folder = save_model(make_model("bloom"), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match="missing; fetch"):
        outputs(folder, torch.arange(3, 9))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        outputs(folder, torch.arange(3, 9))


@pytest.mark.parametrize("name", ["llama", "mixtral", "bloom"])
def test_blocks_whose_files_are_not_here_are_known(tmp_path: Path, name: str) -> None:
    folder = save_model(make_model(name), tmp_path)
    assert not Checkpoint(folder).missing_blocks()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    (folder / "model.safetensors").unlink()
    numbers = {key: re.search(r"\.(\d+)\.", key) for key in tensors}
    file_of = {
        key: f"{number[1] if number else 'ends'}.safetensors" for key, number in numbers.items()
    }
    for file_name in set(file_of.values()):
        held = {key: tensors[key] for key, file in file_of.items() if file == file_name}
        save_file(held, folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    assert not Checkpoint(folder).missing_blocks()
    (folder / "ends.safetensors").unlink()
    (folder / "1.safetensors").unlink()
    assert Checkpoint(folder).missing_blocks() == {1}


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_blocks_are_missing_where_more_than_their_weights_is(tmp_path: Path, name: str) -> None:
    model: Any = make_model(name)
    folder = save_model(model if name == "llama" else model.transformer, tmp_path)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    file_of = dict.fromkeys(names, "model.safetensors")
    matrix = next(one for one in names if re.search(r"\.2\..*dense.weight|\.2\..*q_proj", one))
    file_of[f"{matrix}.absmax"] = "scales.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    assert Checkpoint(folder).missing_blocks() == {2}
    (folder / "scales.safetensors").touch()
    assert not Checkpoint(folder).missing_blocks()


def test_without_its_only_file_a_model_has_no_blocks(tmp_path: Path) -> None:
    folder = save_model(make_model("llama"), tmp_path)
    (folder / "model.safetensors").unlink()
    checkpoint = Checkpoint(folder)
    assert checkpoint.missing_blocks() == set(range(checkpoint.config.num_blocks))


@pytest.mark.parametrize("name", ["bloom", "gemma2", "llama"])
def test_rows_that_are_no_tokens_enter_as_in_hugging_face(tmp_path: Path, name: str) -> None:
    model: Any = make_model(name)
    checkpoint = Checkpoint(save_model(model, tmp_path))
    rows = torch.randn(5, checkpoint.config.hidden_size)
    with torch.no_grad():
        expected = model(inputs_embeds=rows[None], output_hidden_states=True).hidden_states[0][0]
    ends = load_ends(checkpoint, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(ends.embedding.enter(rows), expected)
