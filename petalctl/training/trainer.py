"""The training loop: steps, held-out losses, checkpoints; how it ends early, and how it goes on.

It knows neither daemon nor terminal: a model is what gives a loss, a listener is told what happens.
Invariant: parameters, optimiser and history are always those of a whole number of steps, whatever
ends the run; a run that was broken off and goes on is, bit for bit, the run that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from petalctl.errors import CommandError
from petalctl.stop_signals import StopRequested, StopSignals
from petalctl.training.checkpoints import BadRunFolder, Checkpoint, RunFolder
from petalctl.training.data_order import DataOrder
from petalctl.training.sequences import Batch, TokenSequences
from petalctl.training.settings import TrainSettings, learning_rate

CODE_NOT_FINITE = "not_finite"
_PARAMETER, _OPTIMIZER = "parameter.", "optimizer."


class LossOutput(Protocol):
    """What a model gives."""

    @property
    def loss(self) -> torch.Tensor | None:
        """The mean cross-entropy over the targets."""


class LossModel(Protocol):
    """A model, as Hugging Face's are called."""

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        return_logits: bool,
    ) -> LossOutput:
        """Runs a batch."""


class Listener(Protocol):
    """Who is told how a run goes on."""

    def on_stage(self, text: str) -> None:
        """This is being done now."""

    def on_step(self, report: StepReport) -> None:
        """A step was done."""

    def on_eval(self, step: int, loss: float) -> None:
        """The held-out loss after so many steps."""

    def on_saved(self, step: int) -> None:
        """A checkpoint was saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One step.

    Attributes:
        step: how many are done with it.
        loss: the mean over its targets, before it changed anything.
        lr: the learning rate.
        gradient_norm: before it was shortened.
        tokens_per_s: real ones.
    """

    step: int
    loss: float
    lr: float
    gradient_norm: float
    tokens_per_s: float


@dataclass(slots=True)
class RunHistory:
    """What has been measured.

    Attributes:
        losses: of each step.
        held_out: by the number of steps done before.
    """

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.losses)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on, and what is held out.

    Attributes:
        sequences: both lie in it, unless ``held_out`` is a file's own.
        indices: those to train on.
        held_out: where the held-out sequences lie.
        held_out_indices: which they are; may be none.
    """

    sequences: TokenSequences
    indices: Sequence[int]
    held_out: TokenSequences
    held_out_indices: Sequence[int]


def read_history(checkpoint: Checkpoint) -> RunHistory:
    """What a checkpoint says of the steps before it.

    Raises:
        BadRunFolder: it is damaged.
    """
    try:
        return RunHistory(
            [float(loss) for loss in checkpoint.state["losses"]],
            {int(step): float(loss) for step, loss in checkpoint.state["held_out"]},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadRunFolder(
            f"the checkpoint is damaged ({error}); begin anew with --restart"
        ) from error


class RunStopped(CommandError):
    """The run ended before its end; the text says how to go on, where that is of use."""


class Trainer:
    """Trains some parameters of a model.

    Args:
        model: gives the loss.
        parameters: that are trained, by names that stay.
        settings: of the run.
        data: to train on.
        folder: where checkpoints go.
        arguments: what the checkpoint says of the run, so that it is not gone on with otherwise.
        save_adapter: writes what was learnt, for use.
        listener: is told.
        signals: that end it early.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        model: LossModel,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        settings: TrainSettings,
        data: TrainingData,
        folder: RunFolder,
        arguments: Mapping[str, Any],
        save_adapter: Callable[[Path], None],
        listener: Listener,
        signals: StopSignals,
        now: Callable[[], float],
    ) -> None:
        self.history = RunHistory()
        self._model = model
        self._parameters = dict(parameters)
        self._settings = settings
        self._data = data
        self._folder = folder
        self._arguments = dict(arguments)
        self._save_adapter = save_adapter
        self._listener = listener
        self._signals = signals
        self._now = now
        self._order = DataOrder(len(data.indices), settings.seed)
        self._saved_step = -1
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint.

        Raises:
            BadRunFolder: it is of other parameters, or damaged.
        """
        tensors = checkpoint.tensors
        self.history = read_history(checkpoint)
        self._saved_step = self.history.step
        try:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    saved = tensors[_PARAMETER + name]
                    if saved.shape != parameter.shape:
                        raise ValueError(f"{name} has the shape {list(saved.shape)}")
                    parameter.copy_(saved)
            self._load_optimizer(tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise BadRunFolder(
                f"the checkpoint does not fit ({error}); begin anew with --restart"
            ) from error

    def run(self) -> None:
        """Trains until all steps are done; each checkpoint on the way is one to go on from.

        Raises:
            RunStopped: it was ended early, by the user, by the daemon, or by numbers that are none.
        """
        try:
            if not self.history.step:
                self._save()
            while True:
                self._measure_where_due()
                if self.history.step >= self._settings.steps:
                    break
                self._run_step()
                if self.history.step % self._settings.checkpoint_every == 0:
                    self._save()
                self._signals.check()
            self._save()
        except StopRequested:
            text = f"stopped after step {self.history.step} of {self._settings.steps}"
            raise self._stop(text, code="interrupted", exit_status=130) from None
        except RunStopped:
            raise
        except CommandError as error:
            if error.code == CODE_NOT_FINITE:
                raise self._diverged(str(error)) from error
            if not self.history.step:
                raise RunStopped(str(error), code=error.code) from error
            text = f"{error}. The run ended after step {self.history.step}"
            raise self._stop(text, code=error.code) from error
        except ValueError as error:  # what the blocks' module says of numbers that are not finite
            raise self._diverged(str(error)) from error

    def _run_step(self) -> None:
        began_at = self._now()
        settings, step = self._settings, self.history.step
        self._optimizer.zero_grad(set_to_none=True)
        with self._signals.may_break_off():
            loss, tokens = self._add_gradients(step)
            norm = torch.nn.utils.clip_grad_norm_(
                self._parameters.values(), settings.max_grad_norm or math.inf
            ).item()
            if not math.isfinite(norm):
                raise self._diverged(f"the gradient of step {step + 1} is {norm}")
        lr = learning_rate(step, settings)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.history.losses.append(loss)
        speed = tokens / max(self._now() - began_at, 1e-9)
        self._listener.on_step(
            StepReport(step=step + 1, loss=loss, lr=lr, gradient_norm=norm, tokens_per_s=speed)
        )

    def _add_gradients(self, step: int) -> tuple[float, int]:
        """The gradients of all passes of a step; gives its loss, and how many tokens it had.

        A pass counts by its targets, so that it does not matter how a step's sequences are
        gathered into passes.
        """
        settings = self._settings
        batches = []
        for number in range(step * settings.accumulate, (step + 1) * settings.accumulate):
            chosen = self._order.batch(number, settings.batch_size)
            batches.append(
                self._data.sequences.batch([self._data.indices[index] for index in chosen])
            )
        targets = sum(batch.targets for batch in batches)
        whole = 0.0
        for batch in batches:
            loss = self._loss(batch)
            share = batch.targets / targets
            value = loss.item()
            if not math.isfinite(value):
                raise self._diverged(f"the loss of step {step + 1} is {value}")
            (loss * share).backward()  # type: ignore[no-untyped-call]
            whole += value * share
        return whole, sum(batch.tokens for batch in batches)

    def _measure_where_due(self) -> None:
        settings, step = self._settings, self.history.step
        is_due = step % settings.eval_every == 0 or step >= settings.steps
        indices = self._data.held_out_indices
        if not is_due or step in self.history.held_out or not indices:
            return
        total, targets = 0.0, 0
        with torch.no_grad(), self._signals.may_break_off():
            for first in range(0, len(indices), settings.batch_size):
                self._listener.on_stage(f"held-out loss {first} of {len(indices)}")
                batch = self._data.held_out.batch(indices[first : first + settings.batch_size])
                total += self._loss(batch).item() * batch.targets
                targets += batch.targets
        loss = total / targets
        if not math.isfinite(loss):
            raise self._diverged(f"the held-out loss after step {step} is {loss}")
        self.history.held_out[step] = loss
        self._listener.on_eval(step, loss)

    def _loss(self, batch: Batch) -> torch.Tensor:
        is_padded = batch.tokens < batch.attention_mask_BS.numel()
        loss = self._model(
            input_ids=batch.input_ids_BS,
            attention_mask=batch.attention_mask_BS if is_padded else None,
            labels=batch.labels_BS,
            return_logits=False,
        ).loss
        if loss is None:
            raise RuntimeError("the model gave no loss for labels")
        return loss

    def _save(self) -> None:
        """Saves the adapter for use, then all that is needed to go on."""
        tensors = {
            _PARAMETER + name: parameter.detach().contiguous()
            for name, parameter in self._parameters.items()
        }
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{key}.{name}"] = value.contiguous()
        state = {
            "arguments": self._arguments,
            "losses": self.history.losses,
            "held_out": sorted(self.history.held_out.items()),
        }
        try:
            self._save_adapter(self._folder.path)
            self._folder.save(Checkpoint(state, tensors))
        except OSError as error:
            kept = f"; step {self._saved_step} is saved" if self._saved_step >= 0 else ""
            raise RunStopped(
                f"{self._folder.path} cannot be written: {error}{kept}. Make room, and run the "
                "same command again",
                code="cannot_save",
            ) from error
        self._saved_step = self.history.step
        self._listener.on_saved(self.history.step)

    def _load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for number, name in enumerate(self._parameters):
            ending = f".{name}"
            for key, tensor in tensors.items():
                if key.startswith(_OPTIMIZER) and key.endswith(ending):
                    part = key[len(_OPTIMIZER) : -len(ending)]
                    if "." not in part:
                        state.setdefault(number, {})[part] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _stop(self, text: str, *, code: str, exit_status: int = 1) -> RunStopped:
        self._save()
        return RunStopped(
            f"{text}, which is saved in {self._folder.path}; the same command goes on from there",
            code=code,
            exit_status=exit_status,
        )

    def _diverged(self, text: str) -> RunStopped:
        kept = f"step {self._saved_step} is still in {self._folder.path}"
        return RunStopped(
            f"{text}: the training has diverged. Begin anew with a lower --lr, and --restart or "
            f"another --out; {kept}",
            code=CODE_NOT_FINITE,
        )
