"""``petalctl chat``: a conversation in the terminal, its session kept open between the turns."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from petalctl.client import Client
from petalctl.conversation import Ask, Conversation, Leave, Say
from petalctl.errors import CommandError, JobError
from petalctl.generate_command import (
    describe_speed,
    is_cancelled,
    progress_teller,
)
from petalctl.generate_options import generate_options
from petalctl.interrupts import on_first_interrupt
from petalctl.requests import GenerateOptions
from petalctl.terminal import AnswerWriter, tell

SESSION = "chat"
PROMPT = "> "


def run_chat(args: argparse.Namespace) -> int:
    """Carries out ``petalctl chat``.

    Raises:
        CommandError: the daemon is gone.
    """
    conversation = Conversation(args.system)
    is_interactive = sys.stdin.isatty()
    has_failed = False
    options = generate_options(args)
    options["session"] = SESSION
    with Client(args.socket) as client:
        if is_interactive:
            _show_greeting(client)
        for line in _read_lines(is_interactive):
            action = conversation.on_line(line)
            if isinstance(action, Leave):
                break
            if isinstance(action, Say):
                tell(action.text)
            elif isinstance(action, Ask):
                options["turns"] = action.turns
                has_failed |= not _answer(client, conversation, options, args.show_chain)
    return 1 if has_failed and not is_interactive else 0


def _answer(
    client: Client, conversation: Conversation, options: GenerateOptions, show_chain: bool
) -> bool:
    """Lets the model answer; tells whether it did, as far as the user let it."""
    writer = AnswerWriter(sys.stdout)
    on_progress = progress_teller(writer, show_chain=show_chain)
    try:
        with (
            client.generate(on_progress=on_progress, **options) as generation,
            on_first_interrupt(generation.stop) as interrupt,
        ):
            try:
                for piece in generation:
                    writer.write(piece)
            except JobError as error:
                if not (interrupt.has_come and is_cancelled(error)):
                    raise
                writer.end_line()
                tell("(stopped)")
            conversation.on_answer(generation.text)
            writer.end_line()
            if show_chain and not interrupt.has_come:
                tell(describe_speed(generation.result()))
    except JobError as error:
        writer.end_line()
        conversation.on_failure()
        tell(f"petalctl: {error} [{error.code}]")
        return False
    except CommandError:
        writer.end_line()
        raise
    return True


def _show_greeting(client: Client) -> None:
    models = ", ".join(client.status().models)
    tell(f"{models or 'connected'}. /help tells what there is besides talking; Ctrl-D leaves.")


def _read_lines(is_interactive: bool) -> Iterator[str]:
    """What the user says, line by line, until the end of the input."""
    if not is_interactive:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- importing it gives input() line editing
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            tell("(Ctrl-D or /quit leaves)")
