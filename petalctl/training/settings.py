"""The numbers of a training run, and the learning rate of each step. Standard library only.

Invariant: nothing here depends on how often a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

METHODS = ("prompt", "deep-prompt", "lora")
SCHEDULES = ("constant", "linear", "cosine")

DEFAULT_LR: Mapping[str, float] = {"prompt": 1e-2, "deep-prompt": 1e-2, "lora": 1e-3}
"""Where nobody says better. A prompt's few numbers take larger steps than matrices do: P-Tuning v2
(arXiv:2110.07602) trains with 5e-3 to 2e-2, LoRA (arXiv:2106.09685, table 11) with 2e-4 to 2e-3."""

LEAST_EVAL_EVERY = 10
EVALS_OF_A_RUN = 10
CHECKPOINT_EVERY = 10
"""A checkpoint of an adapter is a few megabytes; a step through a swarm takes a second or more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """The numbers of a run.

    Attributes:
        steps: the optimiser's, counted from the run's beginning.
        batch_size: sequences of one pass.
        accumulate: passes of one step.
        lr: the highest learning rate.
        warmup: so many steps lead up to it.
        schedule: what follows: one of `SCHEDULES`; all but the first end at nothing.
        seed: of the order of the data.
        max_grad_norm: a longer gradient is shortened to it; 0 leaves all as they are.
        weight_decay: as AdamW takes it.
        eval_every: steps from one held-out loss to the next.
        checkpoint_every: steps from one checkpoint to the next.
    """

    steps: int
    batch_size: int = 8
    accumulate: int = 1
    lr: float
    warmup: int = 0
    schedule: str = "constant"
    seed: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    eval_every: int
    checkpoint_every: int = CHECKPOINT_EVERY


def default_eval_every(steps: int) -> int:
    """How often the held-out loss is measured: it costs some steps' time itself."""
    return max(LEAST_EVAL_EVERY, steps // EVALS_OF_A_RUN)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The learning rate of a step.

    Args:
        step: how many were done before it.
        settings: of the run.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    if settings.schedule == "linear":
        return settings.lr * (1 - share)
    return settings.lr * (1 + math.cos(math.pi * share)) / 2
