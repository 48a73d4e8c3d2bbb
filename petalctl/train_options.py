"""The options of ``petalctl train``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from petalctl.option_values import number, whole_number
from petalctl.training.settings import (
    CHECKPOINT_EVERY,
    DEFAULT_LR,
    METHODS,
    SCHEDULES,
)

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

MAX_STEPS = 10**7
MAX_LENGTH = 1 << 20


def add_train_parser(
    commands: Subparsers, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Adds the command; gives its parser, for what all commands have.

    Args:
        commands: of petalctl.
        run: carries it out.
    """
    train = commands.add_parser(
        "train",
        help="fine-tune a model through the swarm",
        description="Train a prompt or a LoRA adapter of a model whose blocks run in the swarm. "
        "Run again, the same command goes on where it was stopped.",
        epilog="Data: a text file is cut into sequences. Of each line of a .jsonl file, "
        '{"text": ...} is learnt as a whole, of {"prompt": ..., "completion": ...} the completion, '
        'of {"messages": [{"role": ..., "content": ...}, ...]} what the assistant says.',
        allow_abbrev=False,
    )
    train.add_argument("--model", required=True, metavar="NAME", help="the model")
    train.add_argument(
        "--method",
        required=True,
        choices=METHODS,
        help="what is trained: embeddings before each text, keys and values in every block, or "
        "low-rank pairs in every block",
    )
    train.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="a .jsonl file, or text"
    )
    train.add_argument(
        "--steps",
        required=True,
        type=whole_number(least=1, most=MAX_STEPS),
        metavar="N",
        help="train so many steps",
    )
    train.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where the adapter goes, in PEFT's format, and the checkpoints",
    )
    train.add_argument(
        "--restart", action="store_true", help="begin anew, where DIR has a run already"
    )
    _add_adapter(train)
    _add_learning(train)
    _add_data(train)
    train.add_argument("--json", action="store_true", help="print one JSON object for each event")
    train.set_defaults(run=run)
    return train


def _add_adapter(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("what is trained")
    group.add_argument(
        "--rank",
        type=whole_number(least=1, most=1024),
        metavar="R",
        help="of the pairs of a LoRA (default: 8)",
    )
    group.add_argument(
        "--alpha",
        type=number(least=0, is_least_allowed=False),
        metavar="A",
        help="their product counts A / R times (default: 16)",
    )
    group.add_argument(
        "--targets",
        metavar="NAMES",
        help="the linear layers that have pairs, or all-linear (default: q_proj,v_proj)",
    )
    group.add_argument(
        "--prompt-tokens",
        type=whole_number(least=1, most=4096),
        metavar="N",
        help="of a prompt (default: 16)",
    )
    group.add_argument(
        "--adapter",
        default="",
        metavar="NAME",
        help="train on top of this adapter, which the servers host",
    )


def _add_learning(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("how it learns")
    defaults = ", ".join(f"{rate:g} for {method}" for method, rate in DEFAULT_LR.items())
    group.add_argument(
        "--lr",
        type=number(least=0, is_least_allowed=False),
        metavar="X",
        help=f"the learning rate (default: {defaults})",
    )
    group.add_argument(
        "--warmup",
        type=whole_number(least=0, most=MAX_STEPS),
        default=0,
        metavar="N",
        help="it rises to that over so many steps (default: %(default)s)",
    )
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="constant",
        help="and then stays, or falls to nothing at the last step (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size",
        type=whole_number(least=1, most=4096),
        default=8,
        metavar="N",
        help="sequences that go through the swarm together (default: %(default)s)",
    )
    group.add_argument(
        "--accumulate",
        type=whole_number(least=1, most=4096),
        default=1,
        metavar="N",
        help="such batches of one step (default: %(default)s)",
    )
    group.add_argument(
        "--max-grad-norm",
        type=number(least=0),
        default=1.0,
        metavar="X",
        help="shorten longer gradients; 0 for none (default: %(default)g)",
    )
    group.add_argument(
        "--weight-decay", type=number(least=0), default=0.0, metavar="X", help="(default: 0)"
    )
    group.add_argument(
        "--seed",
        type=whole_number(least=0, most=2**31),
        default=0,
        metavar="N",
        help="of the first values and of the order of the data (default: %(default)s)",
    )
    group.add_argument(
        "--max-wait",
        type=number(least=0, most=86400),
        metavar="SECONDS",
        help="how long to wait where no server can run some blocks (default: as the daemon is "
        "configured)",
    )


def _add_data(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("data, measurements, checkpoints")
    group.add_argument(
        "--length",
        type=whole_number(least=2, most=MAX_LENGTH),
        default=128,
        metavar="N",
        help="the most tokens of a sequence (default: %(default)s)",
    )
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument(
        "--eval-data", type=Path, metavar="FILE", help="measure the held-out loss on this"
    )
    held_out.add_argument(
        "--held-out",
        type=number(least=0, most=0.9),
        default=0.05,
        metavar="SHARE",
        help="or on this share of the data, 64 sequences at most, which is then not trained on "
        "(default: %(default)g)",
    )
    group.add_argument(
        "--eval-every",
        type=whole_number(least=1, most=MAX_STEPS),
        metavar="N",
        help="measure it every so many steps (default: ten times, but not in under 10 steps)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=whole_number(least=1, most=MAX_STEPS),
        default=CHECKPOINT_EVERY,
        metavar="N",
        help="save every so many steps (default: %(default)s)",
    )
