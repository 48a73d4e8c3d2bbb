"""A run's folder: whatever happens while a checkpoint is written, there is a whole one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import petalctl.training.checkpoints
from petalctl.training.checkpoints import BadRunFolder, Checkpoint, RunFolder, check_arguments

ROOT = Path(__file__).parents[2]


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint({"number": number}, {"a": torch.full((2, 3), float(number))})


def load_number(folder: Path) -> int:
    """The checkpoint's number; in state and tensors alike."""
    with RunFolder(folder) as run:
        loaded = run.load()
    assert loaded is not None
    number = loaded.state["number"]
    assert torch.equal(loaded.tensors["a"], torch.full((2, 3), float(number)))
    return int(number)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir() if path.name != "lock")


def test_last_of_several_is_loaded_and_the_others_are_gone(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b") as run:
        assert run.load() is None
        for number in range(12):
            run.save(checkpoint(number))
    assert load_number(tmp_path / "a" / "b") == 11
    assert names(tmp_path / "a" / "b") == ["save-00000011"]


class Killed(BaseException):
    """Nothing that a process does after it was killed."""


@pytest.mark.parametrize(
    ("place", "name", "expected"),
    [
        (petalctl.training.checkpoints, "save_file", 1),
        (json, "dumps", 1),
        (os, "fsync", 1),
        (os, "replace", 1),
    ],
)
def test_death_before_the_new_one_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, expected: int
) -> None:
    def die(*arguments: object, **named: object) -> None:
        raise Killed

    with RunFolder(tmp_path) as run:
        run.save(checkpoint(1))
        monkeypatch.setattr(place, name, die)
        monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **named: None)
        with pytest.raises(Killed):
            run.save(checkpoint(2))
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2
    assert load_number(tmp_path) == expected
    assert names(tmp_path) == ["save-00000000"]


def test_death_after_it_and_before_the_old_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(tmp_path) as run:
        run.save(checkpoint(1))
        monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **named: None)
        run.save(checkpoint(2))
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2
    assert load_number(tmp_path) == 2
    assert names(tmp_path) == ["save-00000001"]


def test_disk_that_is_full_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    with RunFolder(tmp_path) as run:
        run.save(checkpoint(1))
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            run.save(checkpoint(2))
        assert names(tmp_path) == ["save-00000000"]
    monkeypatch.undo()
    assert load_number(tmp_path) == 1


def test_killed_process_leaves_a_whole_one(tmp_path: Path) -> None:
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from petalctl.training.checkpoints import Checkpoint, RunFolder\n"
        "with RunFolder(Path(sys.argv[1])) as run:\n"
        "    for number in range(10**6):\n"
        "        tensors = {'a': torch.full((2, 3), number * 1.0)}\n"
        "        run.save(Checkpoint({'number': number}, tensors))\n"
        "        print(number, flush=True)\n"
    )
    last = -1
    for round_number in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.05 + 0.03 * round_number)
            process.kill()
            last = int(process.stdout.read().splitlines()[-1])
        assert load_number(tmp_path) in (last, last + 1)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(BadRunFolder, match="another"):
        RunFolder(tmp_path).__enter__()
    with RunFolder(tmp_path):
        pass


def test_restart_removes_what_was_there(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.save(checkpoint(1))
    with RunFolder(tmp_path, is_restart=True) as run:
        assert run.load() is None


def test_adapter_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadRunFolder, match="--restart"):
        RunFolder(tmp_path).__enter__()
    assert not (tmp_path / "checkpoint").exists()
    with RunFolder(tmp_path, is_restart=True):
        pass


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRunFolder, match="cannot be written"):
        RunFolder(tmp_path / "file").__enter__()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_damaged_checkpoint_says_what_to_do(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    with RunFolder(tmp_path) as run:
        run.save(checkpoint(1))
        damage(tmp_path / "checkpoint" / "save-00000000" / name)
        with pytest.raises(BadRunFolder, match="--restart"):
            run.load()


def test_other_arguments_are_named() -> None:
    digests = ("a" * 64, "b" * 64)
    saved = {"--lr": 0.1, "--data": digests[0], "--seed": 3, "--eval-data": digests[0]}
    check_arguments(saved, dict(saved))
    with pytest.raises(BadRunFolder) as raised:
        check_arguments(saved, {"--lr": 0.2, "--data": digests[1], "--seed": 3})
    text = str(raised.value)
    assert "--lr was 0.1 and is 0.2" in text
    assert "--data was aaaaaaaaaaaa… and is bbbbbbbbbbbb…" in text
    assert "--eval-data was aaaaaaaaaaaa… and is not given" in text
    assert "--seed" not in text
    assert "--restart" in text
