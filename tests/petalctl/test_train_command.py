"""``petalctl train`` as a command: its options, what it tells, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import petalctl.train_command
from petalctl.cli import main
from petalctl.errors import JobError
from tests.helpers.tiny_models import make_model, save_model
from tests.helpers.train_stand_in import LocalModel, NoClient, make_local_model, save_tokenizer

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products lose more by waiting for other threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model = make_model("llama", num_hidden_layers=2, vocab_size=258, hidden_size=24)
    return save_tokenizer(save_model(model, folder))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


@pytest.fixture
def arguments(model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    options = "--method lora --steps 4 --length 16 --batch-size 2 --held-out 0.1 --eval-every 2"
    paths = ["--model", model_folder, "--data", data, "--out", tmp_path / "out"]
    return ["train", *map(str, paths), *options.split()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs petalctl here, without a daemon; gives its exit status and what it printed."""
    monkeypatch.setattr(petalctl.train_command, "TrainingClient", NoClient)
    monkeypatch.setattr(petalctl.train_command, "make_model", make_local_model)

    def run(*given: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in given])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_run_tells_how_it_goes_and_how_to_use_it(
    run: Run, arguments: list[str], tmp_path: Path
) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (0, "")
    lines = err.splitlines()
    assert "sequences to train on" in lines[0]
    assert lines[1].startswith("held-out loss after step 0: ")
    assert lines[2].startswith("step 1 of 4: loss ")
    assert (
        lines[-3]
        == f"trained 4 steps of {Path(arguments[2]).name}; the adapter is in {tmp_path}/out"
    )
    assert lines[-2].startswith("held-out loss: ")
    assert f"petalctl generate --model {arguments[2]} --adapter {tmp_path}/out" in lines[-1]


def test_json_is_one_event_on_each_line(run: Run, arguments: list[str], tmp_path: Path) -> None:
    status, out, err = run(*arguments, "--json")
    assert (status, err) == (0, "")
    told = events(out)
    assert [(each["event"], each.get("step")) for each in told] == [
        ("data", None),
        ("saved", 0),
        ("eval", 0),
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("step", 4),
        ("eval", 4),
        ("saved", 4),
        ("done", 4),
    ]
    assert told[3]["tokens_per_s"] > 0
    assert told[3]["lr"] == 1e-3
    done = told[-1]
    assert done["held_out_before"] == told[2]["loss"]
    assert done["held_out_after"] == told[8]["loss"]
    assert done["out"] == f"{tmp_path}/out"


def test_same_command_again_says_that_it_is_done_and_goes_on_with_more_steps(
    run: Run, arguments: list[str]
) -> None:
    whole = events(run(*arguments, "--json")[1])
    status, _, err = run(*arguments)
    assert status == 0
    assert "finished after step 4" in err
    assert "--steps" in err
    assert events(run(*arguments, "--json")[1]) == [{**whole[-1], "was_finished": True}]
    more = events(run(*arguments, "--steps", "6", "--json")[1])
    assert [each["step"] for each in more if each["event"] == "step"] == [5, 6]
    assert "after step 4" in next(each["text"] for each in more if each["event"] == "resumed")


@pytest.mark.parametrize(
    "change",
    [
        ["--lr", "0.5"],
        ["--rank", "3"],
        ["--seed", "1"],
        ["--schedule", "linear"],
        ["--length", "8"],
    ],
)
def test_run_with_other_arguments_is_refused(
    run: Run, arguments: list[str], change: list[str]
) -> None:
    run(*arguments)
    status, out, _ = run(*arguments, *change, "--json")
    error = events(out)[-1]["error"]
    assert (status, error["code"]) == (1, "other_arguments")
    assert change[0] in error["text"]
    assert run(*arguments, *change, "--restart")[0] == 0


def test_run_that_did_nothing_yet_may_be_begun_otherwise(
    run: Run, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **batch: object) -> None:
        raise JobError("unknown_model", "which model?")

    with monkeypatch.context() as patch:
        patch.setattr(LocalModel, "__call__", fail)
        status, _, err = run(*arguments)
        assert (status, err.splitlines()[-1]) == (1, "petalctl: which model? [unknown_model]")
    assert run(*arguments, "--lr", "0.5")[0] == 0


def test_run_with_other_data_is_refused(run: Run, arguments: list[str], data: Path) -> None:
    run(*arguments)
    data.write_text(data.read_text() + "more")
    status, _, err = run(*arguments)
    assert status == 1
    assert "--data was" in err


def test_held_out_data_may_be_a_file(run: Run, arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text('{"text": "the quick brown"}\n' * 3)
    at = arguments.index("--held-out")
    arguments[at : at + 2] = ["--eval-data", str(path)]
    told = events(run(*arguments, "--json")[1])
    assert "3 held out" in told[1]["text"]
    assert told[-1]["held_out_after"] is not None


def test_nothing_need_be_held_out(run: Run, arguments: list[str]) -> None:
    done = events(run(*arguments, "--held-out", "0", "--json")[1])[-1]
    assert (done["event"], done["held_out_before"]) == ("done", None)
    status, _, err = run(*arguments, "--held-out", "0")
    assert status == 0
    assert "finished" in err


@pytest.mark.parametrize("method", ["prompt", "deep-prompt"])
def test_prompts_are_trained_too(run: Run, arguments: list[str], method: str) -> None:
    assert run(*arguments, "--method", method, "--prompt-tokens", 3)[0] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--prompt-tokens 3", "--prompt-tokens is for a prompt; --method is lora"),
        ("--method prompt --rank 3", "--rank is for --method lora"),
        ("--method qlora", "invalid choice"),
        ("--steps 0", "whole number of at least 1"),
        ("--held-out 1", "at most 0.9"),
        ("--held-out 0.1 --eval-data x", "not allowed with"),
        ("--lr nan", "is not a number"),
        ("--length 600", "--length 600 is more than the 512 tokens"),
        ("--length 500 --method prompt --prompt-tokens 13", "and 13 of the prompt"),
    ],
)
def test_wrong_usage_is_said(run: Run, arguments: list[str], change: str, said: str) -> None:
    status, _, err = run(*arguments, *change.split())
    assert status == 2
    assert said in err


def test_too_little_data_is_said(run: Run, arguments: list[str], data: Path) -> None:
    data.write_text("hi")
    status, _, err = run(*arguments)
    assert status == 1
    assert "a single sequence" in err
    assert "[bad_data]" in err


def test_what_is_not_there_is_said(run: Run, arguments: list[str], tmp_path: Path) -> None:
    assert "[unknown_model]" in run(*arguments, "--model", "nonesuch")[2]
    assert "cannot be read" in run(*arguments, "--data", tmp_path / "none.txt")[2]
    assert "no linear layer 'x'" in run(*arguments, "--targets", "x")[2]


def test_no_daemon_is_said(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "petalctl", *arguments, "--socket", str(tmp_path / "none")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "[daemon_unreachable]" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_step_and_saves_the_one_before(
    run: Run, arguments: list[str], number: signal.Signals
) -> None:
    # 2 passes hold out, then 2 steps.
    environ = {**os.environ, "HANG_AFTER_PASSES": "4"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.train_stand_in", *arguments],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(number)
        assert process.wait(20) == 130
        last = process.stderr.read().splitlines()[-1]
    assert "stopped after step" in last
    assert "[interrupted]" in last
    told = events(run(*arguments, "--json")[1])
    assert told[-1]["event"] == "done"
    assert any(each["event"] == "resumed" for each in told)


def test_what_belongs_on_top_of_a_hosted_adapter_is_said_to(run: Run, arguments: list[str]) -> None:
    status, _, err = run(*arguments, "--adapter", "poems")
    assert status == 0
    assert "on top of the hosted adapter poems" in err.splitlines()[-1]
    status, _, err = run(*arguments)
    assert status == 1
    assert "--adapter was poems and is not given" in err
