"""``petalctl generate``: one prompt, one answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from p2p.wire.control_messages import ChainHop, ChainMove, GenerateDone, Progress, Timings
from petalctl.client import Client, Generation
from petalctl.errors import CommandError, JobError
from petalctl.generate_options import generate_options
from petalctl.interrupts import on_first_interrupt
from petalctl.names import shorten_peers
from petalctl.terminal import AnswerWriter, tell

CODE_CANCELLED = "cancelled"
EXIT_INTERRUPTED = 130


def run_generate(args: argparse.Namespace) -> int:
    """Carries out ``petalctl generate``.

    Raises:
        CommandError: it could not; what was made until then has been printed.
    """
    prompt = _read_prompt(args.prompt)
    options = generate_options(args)
    if args.is_raw:
        if args.system:
            raise CommandError(
                "--system needs --chat: a raw prompt has no turns", code="usage", exit_status=2
            )
    else:
        options["turns"] = conversation(args.system, prompt)
    writer = AnswerWriter(sys.stdout)
    with (
        Client(args.socket) as client,
        client.generate(
            prompt if args.is_raw else None,
            on_progress=progress_teller(writer, show_chain=args.show_chain),
            **options,
        ) as generation,
    ):
        if args.json:
            return _print_json(generation)
        return _stream(generation, writer, args.show_chain)


def conversation(system: str | None, prompt: str) -> list[dict[str, str]]:
    """The turns that ask for one answer."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": prompt}]


def _read_prompt(given: str) -> str:
    try:
        prompt = sys.stdin.read() if given == "-" else given
        prompt.encode()
    except UnicodeError as error:
        raise CommandError(
            "the prompt is not valid UTF-8; convert it first", code="usage", exit_status=2
        ) from error
    if not prompt.strip():
        raise CommandError("the prompt is empty; give some text", code="usage", exit_status=2)
    return prompt


def _stream(generation: Generation, writer: AnswerWriter, show_chain: bool) -> int:
    with on_first_interrupt(generation.stop) as interrupt:
        try:
            for piece in generation:
                writer.write(piece)
        except (CommandError, KeyboardInterrupt) as error:
            writer.end_line()
            if interrupt.has_come and is_cancelled(error):
                return EXIT_INTERRUPTED
            raise
    writer.end_line()
    if show_chain:
        tell(describe_speed(generation.result()))
    return 0


def _print_json(generation: Generation) -> int:
    with on_first_interrupt(generation.stop) as interrupt:
        try:
            done = generation.result()
        except (CommandError, KeyboardInterrupt) as error:
            if not interrupt.has_come or not is_cancelled(error):
                raise
            print(json.dumps(_plain_interrupted(generation)))
            return EXIT_INTERRUPTED
    print(json.dumps(plain_result(done)))
    return 0


def is_cancelled(error: BaseException) -> bool:
    """Whether the job ended because it was cancelled."""
    return isinstance(error, JobError) and error.code == CODE_CANCELLED


def _plain_interrupted(generation: Generation) -> dict[str, Any]:
    return {
        "error": {"code": "interrupted", "text": "interrupted by Ctrl-C"},
        "text": generation.text,
        "tokens": list(generation.tokens),
    }


def plain_result(done: GenerateDone) -> dict[str, Any]:
    """A result as JSON has it."""
    return {
        "text": done.text,
        "tokens": list(done.tokens),
        "prompt_tokens": done.prompt_tokens,
        "finish_reason": done.finish_reason,
        "model": done.model,
        "chain": [{"peer": hop.peer, "blocks": [hop.start, hop.end]} for hop in done.chain],
        "timings": _plain_timings(done.timings),
        "moves": [
            {
                "blocks": [move.start, move.end],
                "from": list(move.old),
                "to": list(move.new),
                "reason": move.reason,
                "silent_s": move.silent_s,
                "pause_s": move.pause_s,
                "replayed_tokens": move.replayed_tokens,
                "handed_over_tokens": move.handed_over_tokens,
            }
            for move in done.moves
        ],
    }


def _plain_timings(timings: Timings) -> dict[str, Any]:
    return {
        "time_to_first_token_s": timings.first_token_s,
        "steps_per_s": timings.steps_per_s,
        "total_s": timings.total_s,
        "prefilled_tokens": timings.prefilled_tokens,
        "hop_compute_s": list(timings.hop_compute_s),
        "hop_queue_s": list(timings.hop_queue_s),
    }


def progress_teller(writer: AnswerWriter, *, show_chain: bool) -> Callable[[Progress], None]:
    """Tells on standard error what happens to a job while its answer is written.

    Args:
        writer: of the answer, which may be in the middle of a line.
        show_chain: tell of everything, and not only of why nothing comes.
    """

    def tell_progress(progress: Progress) -> None:
        if show_chain or progress.event == "waiting":
            writer.make_way()
            _show_progress(progress)

    return tell_progress


def _show_progress(progress: Progress) -> None:
    if progress.event == "chain" and progress.chain:
        tell(f"chain: {describe_chain(progress.chain)}")
    elif progress.event == "prefill" and progress.total:
        tell(f"prefill: {progress.done} of {progress.total} tokens")
    elif progress.move is not None:
        tell(describe_move(progress.move))
    else:
        tell(f"{progress.event}: {progress.text}")


def describe_chain(chain: tuple[ChainHop, ...]) -> str:
    """A chain in one line."""
    names = shorten_peers([hop.peer for hop in chain])
    return " → ".join(f"{names[hop.peer]} [{hop.start}:{hop.end}]" for hop in chain)


def describe_move(move: ChainMove) -> str:
    """What happened to some blocks, in one line."""
    names = shorten_peers([*move.old, *move.new])
    old, new = (", ".join(names[peer] for peer in peers) for peers in (move.old, move.new))
    text = f"blocks {move.start}:{move.end} moved from {old} to {new}, {move.pause_s * 1e3:.0f} ms"
    if move.silent_s:
        text += f" after {move.silent_s * 1e3:.0f} ms of silence"
    return f"{text} ({move.reason.replace('_', ' ')})"


def describe_speed(done: GenerateDone) -> str:
    """How long an answer took, in one line."""
    timings = done.timings
    made = len(done.tokens)
    text = f"{made} token{'s' if made != 1 else ''}, the first after {timings.first_token_s:.2f} s"
    if timings.steps_per_s:
        text += f", then {timings.steps_per_s:.1f} tokens/s"
    return f"{text}; {done.prompt_tokens} prompt tokens, {timings.prefilled_tokens} of them new"
