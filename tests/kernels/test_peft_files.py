"""Adapters in PEFT's files: PEFT reads ours, we read what it writes, and damage is told."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm, row_elements
from kernels.checkpoint import Checkpoint
from kernels.errors import BadAdapter
from kernels.head import load_ends
from kernels.model_config import ModelConfig
from kernels.peft_files import (
    SavedAdapter,
    load_adapter,
    save_lora,
    save_prefix,
    save_soft_prompt,
)
from kernels.span import load_span
from kernels.weight_names import linear_sizes
from tests.helpers.tiny_models import make_model, save_model

CPU = torch.device("cpu")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(3))
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Tiny:
    """A tiny model, Hugging Face's and ours."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        save_model(make_model(name), folder)
        checkpoint = Checkpoint(folder)
        self.config = checkpoint.config
        self._span = load_span(
            checkpoint, 0, self.config.num_blocks, dtype=torch.float32, device=CPU
        )
        self._ends = load_ends(checkpoint, dtype=torch.float32, device=CPU)

    def logits(self, saved: SavedAdapter) -> torch.Tensor:
        adapters = []
        hidden = torch.stack([self._ends.embedding.embed(ids) for ids in IDS])
        if saved.form is not None and saved.values_LE is not None:
            adapters.append(SpanAdapter(self.config, saved.form, 0, saved.values_LE))
        if saved.prompt_PD is not None:
            prompt = saved.prompt_PD.expand(len(IDS), -1, -1)
            hidden = torch.cat((self._ends.embedding.enter(prompt), hidden), dim=1)
        out = self._span.forward(hidden, adapters=adapters)
        return torch.stack([self._ends.head.logits(rows) for rows in out])


@pytest.fixture(scope="module", params=["llama-wide-heads", "qwen2", "bloom", "falcon", "gemma3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return Checkpoint(save_model(make_model("llama"), tmp_path_factory.mktemp("llama"))).config


def quiet(call: Callable[[], Any]) -> Any:
    """What PEFT and transformers warn of here is between them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def peft_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = quiet(
            lambda: model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        )
    return logits


def load_with_peft(tiny: Tiny, folder: Path) -> Any:
    return quiet(lambda: PeftModel.from_pretrained(make_model(tiny.name), folder)).eval()


def make_with_peft(tiny: Tiny, peft_config: Any) -> Any:
    """An adapter of PEFT's making, with numbers that do something."""
    model = quiet(lambda: get_peft_model(make_model(tiny.name), peft_config)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))


def random_values(config: ModelConfig, form: AdapterForm, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_blocks, row_elements(config, form))
    return 0.3 * torch.randn(shape, generator=generator)


FORMS = (
    AdapterForm(targets=TARGETS, rank=3, scaling=2.0),
    AdapterForm(targets=("q_proj", "v_proj"), rank=1, scaling=0.3),
    AdapterForm(targets=("down_proj",), rank=7, scaling=-1 / 3),
)


def fitted(config: ModelConfig, form: AdapterForm) -> AdapterForm:
    """The form with the model's layers in the places of Llama's."""
    known = tuple(linear_sizes(config))
    places = {min(TARGETS.index(target), len(known) - 1) for target in form.targets}
    return replace(form, targets=tuple(known[place] for place in sorted(places)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_peft_reads_the_pairs_that_we_write(tiny: Tiny, form: AdapterForm, tmp_path: Path) -> None:
    form = fitted(tiny.config, form)
    values = random_values(tiny.config, form)
    save_lora(tmp_path, tiny.config, form, values, base_model="a/model")
    ours = tiny.logits(SavedAdapter(form, values, None, ""))
    close(ours, peft_logits(load_with_peft(tiny, tmp_path)))
    again = load_adapter(tmp_path, tiny.config)
    assert again.form is not None
    assert (again.form.targets, again.form.rank) == (form.targets, form.rank)
    assert again.form.scaling == pytest.approx(form.scaling, rel=1e-15)
    assert again.values_LE is not None
    assert torch.equal(again.values_LE, values)
    assert (again.prompt_PD, again.base_model) == (None, "a/model")


def test_peft_reads_the_prefix_that_we_write(tiny: Tiny, tmp_path: Path) -> None:
    form = AdapterForm(prefix_tokens=5)
    values = random_values(tiny.config, form)
    save_prefix(tmp_path, tiny.config, form, values, base_model="")
    ours = tiny.logits(SavedAdapter(form, values, None, ""))
    close(ours, peft_logits(load_with_peft(tiny, tmp_path)))
    again = load_adapter(tmp_path, tiny.config)
    assert again.form == form
    assert again.values_LE is not None
    assert torch.equal(again.values_LE, values)
    assert (again.prompt_PD, again.base_model) == (None, "")


def test_peft_reads_the_soft_prompt_that_we_write(tiny: Tiny, tmp_path: Path) -> None:
    prompt = torch.randn(4, tiny.config.hidden_size, generator=torch.Generator().manual_seed(2))
    save_soft_prompt(tmp_path, tiny.config, prompt, base_model="x")
    ours = tiny.logits(SavedAdapter(None, None, prompt, ""))
    close(ours, peft_logits(load_with_peft(tiny, tmp_path)))
    again = load_adapter(tmp_path, tiny.config)
    assert again.prompt_PD is not None
    assert torch.equal(again.prompt_PD, prompt)
    assert (again.form, again.values_LE, again.base_model) == (None, None, "x")


PEFT_CONFIGS: dict[str, Callable[[ModelConfig], Any]] = {
    "all linear": lambda _: LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", task_type=TaskType.CAUSAL_LM
    ),
    "rslora": lambda config: LoraConfig(
        r=5, lora_alpha=4, use_rslora=True, target_modules=[*linear_sizes(config)][1::3]
    ),
    "by pattern": lambda config: LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=rf".*\.({'|'.join([*linear_sizes(config)][::2])})",
        task_type=TaskType.CAUSAL_LM,
    ),
    "prefix": lambda config: PrefixTuningConfig(
        num_virtual_tokens=6,
        token_dim=config.kv_size,
        num_attention_heads=config.num_kv_heads,
        task_type=TaskType.CAUSAL_LM,
    ),
    "soft prompt": lambda _: PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM),
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_we_read_what_peft_writes(tiny: Tiny, kind: str, tmp_path: Path) -> None:
    model = make_with_peft(tiny, PEFT_CONFIGS[kind](tiny.config))
    quiet(lambda: model.save_pretrained(tmp_path))
    close(tiny.logits(load_adapter(tmp_path, tiny.config)), peft_logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_widths_are_read_as_float32(
    config: ModelConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_lora(tmp_path, config, FORMS[1], random_values(config, FORMS[1]), base_model="")
    tensors = load_file(tmp_path / TENSORS_FILE)
    save_file({n: t.to(dtype) for n, t in tensors.items()}, tmp_path / TENSORS_FILE)
    values = load_adapter(tmp_path, config).values_LE
    assert values is not None
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, random_values(config, FORMS[1]), rtol=1e-2, atol=1e-2)


def test_an_adapter_is_replaced_and_nothing_is_left_over(
    config: ModelConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "folder"
    for seed, form in enumerate(FORMS):
        values = random_values(config, form, seed).to(torch.bfloat16).requires_grad_()
        save_lora(folder, config, form, values, base_model="")
        loaded = load_adapter(folder, config)
        assert loaded.values_LE is not None
        assert torch.equal(loaded.values_LE, values.float())
        assert sorted(os.listdir(folder)) == [CONFIG_FILE, TENSORS_FILE]


def test_others_may_read_what_the_user_lets_them_read(config: ModelConfig, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_lora(tmp_path, config, FORMS[0], random_values(config, FORMS[0]), base_model="")
    finally:
        os.umask(before)
    for name in (CONFIG_FILE, TENSORS_FILE):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644


def test_a_failed_save_leaves_the_old_adapter(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMS[1]
    save_lora(tmp_path, config, form, random_values(config, form), base_model="")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("kernels.peft_files.save", fail)
    with pytest.raises(OSError, match="no space"):
        save_lora(tmp_path, config, form, random_values(config, form, 6), base_model="")
    loaded = load_adapter(tmp_path, config).values_LE
    assert loaded is not None
    assert torch.equal(loaded, random_values(config, form))
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, TENSORS_FILE]


def test_what_does_not_fit_is_not_written(config: ModelConfig, tmp_path: Path) -> None:
    both = AdapterForm(targets=("q_proj",), rank=1, prefix_tokens=2)
    values = random_values(config, both)
    for save in (save_lora, save_prefix):
        with pytest.raises(BadAdapter, match="two adapters"):
            save(tmp_path, config, both, values, base_model="")
        with pytest.raises(BadAdapter, match="does nothing"):
            save(tmp_path, config, AdapterForm(), values, base_model="")
    with pytest.raises(BadAdapter, match="a row for each block"):
        save_lora(tmp_path, config, FORMS[0], values, base_model="")
    for shape in ((3, 47), (48,), (0, 48), (5000, 48)):
        with pytest.raises(BadAdapter):
            save_soft_prompt(tmp_path, config, torch.zeros(shape), base_model="")
    assert not os.listdir(tmp_path)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "LORA, PREFIX_TUNING"),
    "no method": ({"peft_type": None}, "not supported"),
    "a method that is a list": ({"peft_type": ["LORA"]}, "not supported"),
    "dora": ({"use_dora": True}, "use_dora"),
    "ranks by pattern": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    "alphas by pattern": ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "some layers": ({"layers_to_transform": [0, 1]}, "layers_to_transform"),
    "layer zero": ({"layers_to_transform": 0}, "layers_to_transform"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
    "biases": ({"bias": "all"}, "bias"),
    "biases of its own": ({"lora_bias": True}, "lora_bias"),
    "other base weights": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "no rank": ({"r": None}, "r = None"),
    "a rank of zero": ({"r": 0}, "1 to 1024"),
    "a huge rank": ({"r": 10**400}, "huge"),
    "a rank that is true": ({"r": True}, "whole number"),
    "another rank": ({"r": 2}, r"imply \[2, 48\]"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "a huge alpha": ({"lora_alpha": 10**400}, "lora_alpha"),
    "alpha is no number": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "alpha is a text": ({"lora_alpha": "8"}, "lora_alpha"),
    "alpha is true": ({"lora_alpha": True}, "lora_alpha"),
    "rslora is a text": ({"use_rslora": "yes"}, "use_rslora"),
    "base model is a number": ({"base_model_name_or_path": 3}, "not a text"),
    "really a prefix": ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}, "lacks 1"),
    "a prefix without length": ({"peft_type": "PREFIX_TUNING"}, "num_virtual_tokens"),
    "a prefix of a network": (
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "prefix_projection": True},
        "prefix_projection",
    ),
    "an endless prompt": (
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1 << 40},
        "1 to 4096",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_configuration_is_refused(config: ModelConfig, case: str, tmp_path: Path) -> None:
    changes, text = BAD_CONFIGS[case]
    save_lora(tmp_path, config, FORMS[1], random_values(config, FORMS[1]), base_model="")
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadAdapter, match=text):
        load_adapter(tmp_path, config)


HARMLESS: tuple[dict[str, Any], ...] = (
    {"target_modules": "all-linear"},
    {"target_modules": None, "exclude_modules": ["lm_head"]},
    {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    {"rank_pattern": {}, "alpha_pattern": None, "use_dora": False, "a_new_key": 3},
    {"base_model_name_or_path": None, "task_type": None},
)


@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_a_configuration_is_taken(
    config: ModelConfig, changes: dict[str, Any], tmp_path: Path
) -> None:
    save_lora(tmp_path, config, FORMS[1], random_values(config, FORMS[1]), base_model="")
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    form = load_adapter(tmp_path, config).form
    assert form is not None
    assert (form.targets, form.rank) == (FORMS[1].targets, FORMS[1].rank)


def name(target: str, block: int = 0, side: str = "lora_A") -> str:
    return f"base_model.model.model.layers.{block}.self_attn.{target}.{side}.weight"


def drop_block(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if ".layers.2." in key]:
        del tensors[key]


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "one is missing": (lambda t: t.pop(name("q_proj", 1, "lora_B")), "lacks 1 "),
    "a block is missing": (drop_block, "lacks 4 tensors.*every block"),
    "all are missing": (lambda t: t.clear(), "none of the 0 tensors"),
    "one too many": (lambda t: t.update({name("k_proj"): torch.zeros(1, 48)}), "lacks 7"),
    "a block too many": (lambda t: t.update({name("q_proj", 4): torch.zeros(1, 48)}), "beyond"),
    "of another layer": (lambda t: t.update({name("w_proj"): torch.zeros(1, 48)}), "beyond"),
    "the embeddings too": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(9, 48)}),
        "embed_tokens",
    ),
    "too wide": (lambda t: t.update({name("q_proj"): torch.zeros(1, 49)}), "shape"),
    "flat": (lambda t: t.update({name("q_proj"): torch.zeros(48)}), "shape"),
    "whole numbers": (
        lambda t: t.update({name("q_proj"): torch.zeros(1, 48, dtype=torch.int32)}),
        "dtype I32",
    ),
    "not finite": (lambda t: t[name("q_proj")].fill_(float("inf")), "not finite"),
    "beyond float32": (
        lambda t: t.update({name("q_proj"): torch.full((1, 48), 1e300, dtype=torch.float64)}),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_are_refused(config: ModelConfig, case: str, tmp_path: Path) -> None:
    change, text = BAD_TENSORS[case]
    save_lora(tmp_path, config, FORMS[1], random_values(config, FORMS[1]), base_model="")
    tensors = load_file(tmp_path / TENSORS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / TENSORS_FILE)
    with pytest.raises(BadAdapter, match=text):
        load_adapter(tmp_path, config)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no configuration": (CONFIG_FILE, Path.unlink),
    "no tensors": (TENSORS_FILE, Path.unlink),
    "a directory": (CONFIG_FILE, make_directory),
    "half a configuration": (CONFIG_FILE, lambda p: p.write_bytes(p.read_bytes()[:40])),
    "no object": (CONFIG_FILE, lambda p: p.write_text("[1]")),
    "deep": (CONFIG_FILE, lambda p: p.write_text("[" * 100_000)),
    "endless": (CONFIG_FILE, lambda p: p.write_bytes(b" " * (1 << 20) + p.read_bytes())),
    "no text": (CONFIG_FILE, lambda p: p.write_bytes(b"\xff\xfe\x00\x80" * 9)),
    "half the tensors": (TENSORS_FILE, lambda p: p.write_bytes(p.read_bytes()[:3000])),
    "half the header": (TENSORS_FILE, lambda p: p.write_bytes(p.read_bytes()[:30])),
    "empty": (TENSORS_FILE, lambda p: p.write_bytes(b"")),
    "a pickle": (TENSORS_FILE, lambda p: torch.save({"a": torch.zeros(2)}, p)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_told(config: ModelConfig, case: str, tmp_path: Path) -> None:
    file, damage = DAMAGE[case]
    save_lora(tmp_path, config, FORMS[1], random_values(config, FORMS[1]), base_model="")
    damage(tmp_path / file)
    with pytest.raises(BadAdapter, match="adapter_"):
        load_adapter(tmp_path, config)


def test_a_prefix_that_peft_has_otherwise(tmp_path: Path) -> None:
    config = Checkpoint(save_model(make_model("falcon-groups"), tmp_path)).config
    form = AdapterForm(prefix_tokens=2)
    with pytest.raises(BadAdapter, match="take low-rank pairs"):
        save_prefix(tmp_path, config, form, random_values(config, form), base_model="")


def test_of_another_model(config: ModelConfig, tmp_path: Path) -> None:
    other = Checkpoint(save_model(make_model("llama-multi-head"), tmp_path / "model")).config
    form = AdapterForm(prefix_tokens=2)
    save_prefix(tmp_path / "prefix", other, form, random_values(other, form), base_model="")
    with pytest.raises(BadAdapter, match="shape"):
        load_adapter(tmp_path / "prefix", config)
    save_soft_prompt(tmp_path / "prompt", other, torch.zeros(2, 48), base_model="")
    assert load_adapter(tmp_path / "prompt", config).prompt_PD is not None
