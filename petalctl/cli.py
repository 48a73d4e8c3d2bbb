"""``petalctl``: the command line. It reads the arguments, runs one command, and says how it ended.

Whatever takes time to import is imported by the command that needs it, so that ``--help`` is quick.
Exit status: 0 done, 1 not done, 2 called wrongly, 3 no daemon, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from petalctl.errors import CommandError, JobError
from petalctl.generate_options import add_generate_options
from petalctl.models import add_model_parser
from petalctl.option_values import number, whole_number
from petalctl.service import add_service_parser
from petalctl.terminal import give_up_standard_output, neutralise, prepare_standard_streams, tell
from petalctl.train_options import add_train_parser

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program that SIGPIPE ended."""

DEMO_MODEL = "smollm2-135m-instruct"
CHAT_TEMPERATURE = 0.7


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_standard_streams()
    wants_json = "--json" in arguments
    args = build_parser(wants_json=wants_json).parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except CommandError as error:
        return _report(error, wants_json=wants_json)
    except KeyboardInterrupt:
        if wants_json:
            print_error("interrupted", "interrupted by Ctrl-C")
        else:
            print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        give_up_standard_output()
        return EXIT_BROKEN_PIPE
    return status


def print_error(code: str, text: str) -> None:
    """An error for programs, on standard output."""
    print(json.dumps({"error": {"code": code, "text": text}}), flush=True)


def _report(error: CommandError, *, wants_json: bool) -> int:
    try:
        if wants_json:
            print_error(error.code, str(error))
        else:
            # Only what was written here may have more lines: the end of a daemon's log.
            own = "" if isinstance(error, JobError) else str(error)
            first, _, more = own.partition("\n")
            tell(f"petalctl: {first or error} [{error.code}]")
            if more:
                print(neutralise(more), file=sys.stderr, flush=True)
    except BrokenPipeError:
        give_up_standard_output()
    return error.exit_status


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong as the caller can read it."""

    wants_json = False

    def error(self, message: str) -> NoReturn:
        if self.wants_json:
            print_error("usage", message)
        else:
            tell(f"{self.prog}: {message} (see {self.prog} --help)")
        raise SystemExit(EXIT_USAGE)


def build_parser(*, wants_json: bool = False) -> argparse.ArgumentParser:
    """The parser of all commands; the chosen one's function is ``run`` in what it gives."""
    kind: type[_Parser] = type("_ChosenParser", (_Parser,), {"wants_json": wants_json})
    parser: argparse.ArgumentParser = kind(
        prog="petalctl",
        description="Talk to petald, the daemon with which people together run language models "
        "too large for any one of them.",
        epilog="exit status: 0 done, 1 not done, 2 called wrongly, 3 no daemon, 130 Ctrl-C",
        allow_abbrev=False,
    )
    _add_socket(parser, default=None)
    parser.add_argument("--version", action=_ShowVersion)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )
    _add_generate(commands)
    _add_chat(commands)
    _add_reports(commands)
    _add_pauses(commands)
    _add_demo(commands)
    add_model_parser(commands)
    add_service_parser(commands)
    _add_socket(add_train_parser(commands, _late("petalctl.train_command", "run_train")))
    return parser


class _ShowVersion(argparse.Action):
    """Prints the version, which takes time to find out."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version, and exit")

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from importlib.metadata import version

        print(f"petalctl {version('petald')}")
        parser.exit()


def _add_generate(commands: Subparsers) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt; the text streams as it is made",
        description="Continue a prompt. The text goes to standard output as it is made.",
        allow_abbrev=False,
    )
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    _add_model_choice(generate)
    form = generate.add_mutually_exclusive_group()
    form.add_argument(
        "--chat",
        dest="is_raw",
        action="store_false",
        default=False,
        help="the prompt is a user's turn in a conversation (default)",
    )
    form.add_argument(
        "--raw", dest="is_raw", action="store_true", help="the prompt is continued as it is"
    )
    generate.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    add_generate_options(generate)
    _add_json(generate)
    generate.add_argument(
        "--show-chain", action="store_true", help="tell of chain, progress and speed on stderr"
    )
    _add_socket(generate)
    generate.set_defaults(run=_late("petalctl.generate_command", "run_generate"))


def _add_chat(commands: Subparsers) -> None:
    chat = commands.add_parser(
        "chat",
        help="have a conversation",
        description="Have a conversation. Ctrl-C ends an answer, Ctrl-D or /quit the "
        "conversation; /help tells of more.",
        allow_abbrev=False,
    )
    _add_model_choice(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    add_generate_options(chat, temperature=CHAT_TEMPERATURE)
    chat.add_argument(
        "--show-chain", action="store_true", help="tell of chain, progress and speed on stderr"
    )
    _add_socket(chat)
    chat.set_defaults(run=_late("petalctl.chat", "run_chat"))


def _add_reports(commands: Subparsers) -> None:
    status = commands.add_parser(
        "status", help="what this machine's daemon is and does", allow_abbrev=False
    )
    _add_json(status)
    _add_socket(status)
    status.set_defaults(run=_late("petalctl.reports", "run_status"))
    swarm = commands.add_parser(
        "swarm",
        help="each model's servers, and which blocks they cover",
        allow_abbrev=False,
    )
    swarm.add_argument("--model", default="", metavar="NAME", help="only this model")
    _add_json(swarm)
    _add_socket(swarm)
    swarm.set_defaults(run=_late("petalctl.reports", "run_swarm"))


def _add_pauses(commands: Subparsers) -> None:
    pause = commands.add_parser(
        "pause",
        help="have this machine's server make way for you",
        usage="petalctl pause [for 2h | until 08:00] [--within SECONDS] [--json] [--socket PATH]",
        description="Take this machine's server out of the swarm without disturbing anybody: its "
        "sessions move to other servers, and it takes no new ones, for a while or until "
        "`petalctl resume`, even if the daemon is started again.",
        allow_abbrev=False,
    )
    pause.add_argument(
        "time", nargs="*", metavar="for 2h | until 08:00", help="how long (default: until resumed)"
    )
    pause.add_argument(
        "--within",
        type=number(least=0, most=86400),
        metavar="SECONDS",
        help="how long the sessions have to move (default: [lend] yield_within_s)",
    )
    _add_json(pause)
    _add_socket(pause)
    pause.set_defaults(run=_late("petalctl.pause_command", "run_pause"))
    resume = commands.add_parser("resume", help="end a pause, and lend again", allow_abbrev=False)
    _add_json(resume)
    _add_socket(resume)
    resume.set_defaults(run=_late("petalctl.pause_command", "run_resume"))


def _add_demo(commands: Subparsers) -> None:
    demo = commands.add_parser(
        "demo",
        help="start a private swarm on this machine, and let it speak",
        description="Start a private swarm of real daemons on this machine, share a model's "
        "blocks among them, and generate through it. Fetches the model where it is not here yet.",
        allow_abbrev=False,
    )
    demo.add_argument(
        "--servers",
        type=whole_number(least=1, most=64),
        default=3,
        metavar="N",
        help="so many servers share the model's blocks (default: %(default)s)",
    )
    demo.add_argument(
        "--prompt",
        default="Why is the sky blue? Answer in two sentences.",
        metavar="TEXT",
        help="what to ask (default: %(default)r)",
    )
    demo.add_argument(
        "--model", default=DEMO_MODEL, metavar="NAME", help="the model (default: %(default)s)"
    )
    demo.add_argument(
        "--threads",
        type=whole_number(least=1, most=1024),
        metavar="N",
        help="processor threads of each daemon (default: what there is, shared by the servers)",
    )
    demo.add_argument(
        "--max-new-tokens",
        type=whole_number(least=1),
        default=128,
        metavar="N",
        help="the most tokens to make (default: %(default)s)",
    )
    end = demo.add_mutually_exclusive_group()
    end.add_argument(
        "--keep", action="store_true", help="leave the swarm running, and tell how to use it"
    )
    end.add_argument(
        "--stop",
        dest="stop_folder",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="end a swarm that --keep left running",
    )
    demo.set_defaults(run=_late("petalctl.demo", "run_demo"))


def _add_socket(parser: argparse.ArgumentParser, default: str | None = argparse.SUPPRESS) -> None:
    """Adds the choice of the daemon; the commands take it too, and leave alone what came before."""
    parser.add_argument(
        "--socket",
        default=default,
        metavar="PATH",
        help="the daemon's Unix socket (default: $PETALD_SOCKET, or where a daemon usually is)",
    )


def _add_model_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="the model; needed where the daemon routes for several",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _late(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A command whose module is imported when it is run."""

    def run(args: argparse.Namespace) -> int:
        import importlib

        command: Callable[[argparse.Namespace], int]
        command = getattr(importlib.import_module(module), function)
        return command(args)

    return run
