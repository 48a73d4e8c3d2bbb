"""The training loop on a tiny model: what it learns, how it ends, how it goes on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.model_config import ModelConfig
from petalctl.errors import CommandError, ConnectionLost, JobError
from petalctl.stop_signals import StopSignals
from petalctl.torch.adapters import DeepPrompt, RemoteAdapter, RemoteLora
from petalctl.torch.soft_prompt import SoftPrompt
from petalctl.training.checkpoints import BadRunFolder, RunFolder
from petalctl.training.sequences import SequenceCollector, TokenSequences
from petalctl.training.settings import TrainSettings
from petalctl.training.trainer import RunStopped, StepReport, Trainer, TrainingData
from tests.helpers.tiny_models import make_model, save_model
from tests.helpers.train_stand_in import LocalModel

STEPS = 7


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products lose more by waiting for other threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("llama", num_hidden_layers=2)
    return save_model(model, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def sequences() -> TokenSequences:
    collector = SequenceCollector(12)
    for number in range(20):
        ids = [1, *((7 * number + 3 * place) % 100 for place in range(4 + number % 6))]
        collector.add(ids, [True] * len(ids))
    return collector.finish()


class Heard:
    """Listens; may do something after a step."""

    def __init__(self, after_step: Callable[[int], None] = lambda step: None) -> None:
        self.steps: list[StepReport] = []
        self.held_out: list[tuple[int, float]] = []
        self.saved: list[int] = []
        self._after_step = after_step

    def on_stage(self, text: str) -> None:
        pass

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)
        self._after_step(report.step)

    def on_eval(self, step: int, loss: float) -> None:
        self.held_out.append((step, loss))

    def on_saved(self, step: int) -> None:
        self.saved.append(step)


class Failing(LocalModel):
    """A model whose passes raise at some time."""

    def __init__(self, *given: Any, at: int, error: BaseException) -> None:
        super().__init__(*given)
        self._at = at
        self._error = error

    def __call__(self, **batch: Any) -> Any:
        if self.passes == self._at:
            raise self._error
        return super().__call__(**batch)


def make_trained(method: str, config: ModelConfig) -> RemoteAdapter | SoftPrompt:
    if method == "lora":
        return RemoteLora(config, rank=2, seed=5)
    return (
        DeepPrompt(config, tokens=3, seed=5)
        if method == "deep-prompt"
        else SoftPrompt(config, tokens=3, seed=5)
    )


class World:
    """Everything that a run needs, each time anew but for its folder."""

    def __init__(self, model_folder: Path, folder: Path, sequences: TokenSequences) -> None:
        self.model_folder = model_folder
        self.folder = folder
        self.data = TrainingData(sequences, range(16), sequences, range(16, 20))
        self.heard = Heard()
        self.signals = StopSignals()
        self.trained: RemoteAdapter | SoftPrompt | None = None

    def run(
        self,
        method: str = "lora",
        *,
        heard: Heard | None = None,
        failing: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Trainer:
        kind = {"batch_size": 3, "lr": 0.01, "eval_every": 3, "checkpoint_every": 2}
        settings = TrainSettings(**({"steps": STEPS} | kind | changes))
        self.heard = heard or Heard()
        config = LocalModel(self.model_folder, None).config
        trained = self.trained = make_trained(method, config)
        is_adapter = isinstance(trained, RemoteAdapter)
        parts = (trained, None) if is_adapter else (None, trained)
        maker = LocalModel if failing is None else Failing
        model = maker(self.model_folder, *parts, **(failing or {}))  # type: ignore[arg-type]
        with RunFolder(self.folder) as run, self.signals:
            checkpoint = run.load()
            trainer = Trainer(
                model,  # type: ignore[arg-type]
                dict(trained.named_parameters()),
                settings=settings,
                data=self.data,
                folder=run,
                arguments={"--lr": 1},
                save_adapter=lambda path: trained.save(path, base_model="tiny"),
                listener=self.heard,
                signals=self.signals,
                now=itertools.count().__next__,
            )
            if checkpoint is not None:
                trainer.resume(checkpoint)
            trainer.run()
        return trainer


@pytest.fixture
def make_world(
    model_folder: Path, tmp_path: Path, sequences: TokenSequences
) -> Callable[[str], World]:
    return lambda name: World(model_folder, tmp_path / name, sequences)


METHODS = pytest.mark.parametrize("method", ["lora", "deep-prompt", "prompt"])


@METHODS
def test_loss_falls_and_the_adapter_is_saved(
    make_world: Callable[[str], World], method: str
) -> None:
    world = make_world("a")
    trainer = world.run(method, steps=40, lr=0.05, eval_every=20)
    held_out = trainer.history.held_out
    assert sorted(held_out) == [0, 20, 40]
    assert sum(trainer.history.losses[-5:]) < 0.98 * sum(trainer.history.losses[:5])
    assert world.heard.saved == [0, *range(2, 41, 2), 40]
    assert (world.folder / "adapter_config.json").is_file()
    config = LocalModel(world.model_folder, None).config
    kind = SoftPrompt if method == "prompt" else RemoteAdapter
    loaded = kind.from_folder(world.folder, config)
    assert world.trained is not None
    for one, other in zip(loaded.parameters(), world.trained.parameters(), strict=True):
        assert torch.equal(one, other)


@METHODS
@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_run_that_goes_on_is_the_run_that_was_not_stopped(
    make_world: Callable[[str], World], method: str, stop_at: int
) -> None:
    whole = make_world("whole")
    expected = whole.run(method, accumulate=2)
    broken = make_world("broken")

    def stop(step: int) -> None:
        if step == stop_at:
            broken.signals.has_come = True

    with pytest.raises(RunStopped) as raised:
        broken.run(method, heard=Heard(stop), accumulate=2)
    assert raised.value.exit_status == 130
    assert f"after step {stop_at} of {STEPS}" in str(raised.value)
    broken.signals = StopSignals()
    found = broken.run(method, accumulate=2)
    assert [report.step for report in broken.heard.steps] == list(range(stop_at + 1, STEPS + 1))
    assert found.history == expected.history
    assert whole.trained is not None
    assert broken.trained is not None
    for one, other in zip(whole.trained.parameters(), broken.trained.parameters(), strict=True):
        assert torch.equal(one, other)


def test_run_goes_on_from_its_last_checkpoint_after_a_crash(
    make_world: Callable[[str], World],
) -> None:
    expected = make_world("whole").run()
    broken = make_world("broken")
    # 5 steps, and 2 x 2 passes for the held-out losses after 0 and 3 steps.
    with pytest.raises(RuntimeError, match="bang"):
        broken.run(failing={"at": 9, "error": RuntimeError("bang")})
    assert broken.heard.steps[-1].step == 5
    found = broken.run()
    assert broken.heard.steps[0].step == 5
    assert found.history == expected.history


def test_more_steps_go_on_where_fewer_ended(make_world: Callable[[str], World]) -> None:
    expected = make_world("whole").run(eval_every=2)
    world = make_world("parts")
    world.run(steps=4, eval_every=2)
    assert world.run(eval_every=2).history == expected.history


def test_passes_of_a_step_are_one_step(make_world: Callable[[str], World]) -> None:
    """However its sequences are gathered, though they are of different lengths."""
    one = make_world("one").run(batch_size=6, accumulate=1, steps=3).history.losses
    three = make_world("three").run(batch_size=2, accumulate=3, steps=3).history.losses
    assert one == pytest.approx(three, rel=1e-5)


def test_interrupted_pass_is_given_up_and_the_step_before_saved(
    make_world: Callable[[str], World],
) -> None:
    world = make_world("a")
    with pytest.raises(RunStopped, match="stopped after step 4 of 7") as raised:
        world.run(failing={"at": 8, "error": KeyboardInterrupt()})
    assert raised.value.code == "interrupted"
    assert world.heard.saved == [0, 2, 4, 4]
    world.signals = StopSignals()
    assert world.run().history == make_world("whole").run().history


@pytest.mark.parametrize(
    "error", [JobError("missing_blocks", "nobody holds 1:2"), ConnectionLost("it went away")]
)
def test_daemon_that_fails_ends_the_run_in_good_order(
    make_world: Callable[[str], World], error: CommandError
) -> None:
    world = make_world("a")
    with pytest.raises(RunStopped) as raised:
        world.run(failing={"at": 7, "error": error})
    text = str(raised.value)
    assert text.startswith(str(error))
    assert "after step 3" in text
    assert "same command goes on" in text
    assert (raised.value.code, raised.value.exit_status) == (error.code, 1)
    assert world.heard.saved[-1] == 3
    assert world.run().history == make_world("whole").run().history


def test_daemon_that_fails_at_once_is_not_talked_about(
    make_world: Callable[[str], World],
) -> None:
    with pytest.raises(RunStopped) as raised:
        make_world("a").run(failing={"at": 0, "error": JobError("unknown_model", "which?")})
    assert str(raised.value) == "which?"


class Diverging(Failing):
    """A model whose loss is no number at some time."""

    def __call__(self, **batch: Any) -> Any:
        if self.passes != self._at:
            return LocalModel.__call__(self, **batch)
        output = LocalModel.__call__(self, **batch)
        assert output.loss is not None
        output.loss.data.fill_(math.nan)
        return output


def test_loss_that_is_no_number_keeps_the_checkpoint_before(
    make_world: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world("a")
    monkeypatch.setattr(Failing, "__call__", Diverging.__call__)
    with pytest.raises(RunStopped, match=r"loss of step 4 is nan.*--lr.*step 2 is still") as raised:
        world.run(failing={"at": 7, "error": KeyboardInterrupt()})
    assert (raised.value.code, raised.value.exit_status) == ("not_finite", 1)
    assert world.heard.saved == [0, 2]


def test_servers_that_find_no_numbers_end_the_run_likewise(
    make_world: Callable[[str], World],
) -> None:
    world = make_world("a")
    with pytest.raises(RunStopped, match="lower --lr"):
        world.run(failing={"at": 7, "error": JobError("not_finite", "a result is not finite")})
    assert world.heard.saved == [0, 2]


def test_disk_that_is_full_says_what_is_kept(
    make_world: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: int) -> None:
        if step == 3:
            monkeypatch.setattr(RunFolder, "save", fail_to_save)

    def fail_to_save(*given: object) -> None:
        raise OSError("no space left on device")

    world = make_world("a")
    with pytest.raises(RunStopped, match=r"no space.*step 2 is saved") as raised:
        world.run(heard=Heard(fail))
    assert raised.value.code == "cannot_save"


def test_checkpoint_of_something_else_is_refused(make_world: Callable[[str], World]) -> None:
    world = make_world("a")
    world.run("lora", steps=2)
    with pytest.raises(BadRunFolder, match="does not fit"):
        world.run("deep-prompt")
