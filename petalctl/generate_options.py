"""The options that say how an answer is made; ``generate``, ``chat`` and ``demo`` share them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from petalctl.option_values import MAX_STOPS, number, stop_text, whole_number

if TYPE_CHECKING:
    from petalctl.requests import GenerateOptions


def add_generate_options(parser: argparse.ArgumentParser, *, temperature: float = 0.0) -> None:
    """Adds the options to a command's parser.

    Args:
        parser: of the command.
        temperature: the command's default.
    """
    options = parser.add_argument_group("how the answer is made")
    options.add_argument(
        "--max-new-tokens",
        type=whole_number(least=1),
        default=256,
        metavar="N",
        help="the most tokens to make (default: %(default)s)",
    )
    options.add_argument(
        "--temperature",
        type=number(least=0),
        default=temperature,
        metavar="T",
        help="0 takes the likeliest token each time (default: %(default)s)",
    )
    options.add_argument(
        "--top-k",
        type=whole_number(least=0),
        default=0,
        metavar="K",
        help="choose among the K likeliest tokens; 0 among all (default)",
    )
    options.add_argument(
        "--top-p",
        type=number(least=0, most=1, is_least_allowed=False),
        default=1.0,
        metavar="P",
        help="choose among the likeliest tokens that make up P of the probability (default: 1)",
    )
    options.add_argument(
        "--min-p",
        type=number(least=0, most=1),
        default=0.0,
        metavar="P",
        help="leave out tokens less probable than P times the likeliest (default: 0)",
    )
    options.add_argument(
        "--repetition-penalty",
        type=number(least=0, is_least_allowed=False),
        default=1.0,
        metavar="R",
        help="over 1: tokens that stand there already become less likely (default: 1)",
    )
    options.add_argument(
        "--seed",
        type=whole_number(least=0, most=2**53),
        metavar="N",
        help="the same seed gives the same answer",
    )
    options.add_argument(
        "--stop",
        type=stop_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )
    options.add_argument(
        "--max-wait",
        type=number(least=0, most=86400),
        metavar="SECONDS",
        help="how long to wait where no server can run some blocks (default: as the daemon is "
        "configured)",
    )
    options.add_argument(
        "--adapter",
        default="",
        metavar="DIR|NAME",
        help="a folder with an adapter in PEFT's format (LoRA, prefix or prompt tuning), which the "
        "daemon can read, or the name of an adapter that servers host",
    )


def generate_options(args: argparse.Namespace) -> GenerateOptions:
    """What the user chose, as the client takes it.

    Raises:
        CommandError: there are too many stop texts.
    """
    if len(args.stop) > MAX_STOPS:
        from petalctl.errors import CommandError

        raise CommandError(
            f"--stop was given {len(args.stop)} times; at most {MAX_STOPS} are taken",
            code="usage",
            exit_status=2,
        )
    return {
        "model": args.model,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": args.stop,
        "max_wait_s": args.max_wait,
        "adapter": args.adapter,
    }
