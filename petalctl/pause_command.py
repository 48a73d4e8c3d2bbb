"""``petalctl pause`` and ``petalctl resume``: the owner wants the machine, or lends it again."""

from __future__ import annotations

import argparse
import json
from datetime import datetime

from petalctl.client import Client
from petalctl.errors import CommandError
from petalctl.pauses import format_end, parse_pause
from petalctl.terminal import neutralise_line


def run_pause(args: argparse.Namespace) -> int:
    """Carries out ``petalctl pause``.

    Raises:
        CommandError: the words are no time, or the daemon did not answer, or serves nothing.
    """
    now = datetime.now()
    for_s = parse_pause(args.time, now)
    with Client(args.socket) as client:
        paused = client.pause(for_s, within_s=args.within)
    if args.json:
        plain = {"sessions": paused.sessions, "left": paused.left, "for_s": for_s}
        print(json.dumps(plain))
        return 0
    if for_s is None:
        print("paused; to lend again: petalctl resume")
    else:
        print(f"paused until {format_end(for_s, now)}; to lend again before: petalctl resume")
    if not paused.left:
        print("its blocks leave the memory as soon as nothing uses them, until it lends again")
    if paused.sessions:
        moved = paused.sessions - paused.left
        print(f"{moved} of {paused.sessions} sessions moved to other servers")
    if paused.left:
        print(
            f"{paused.left} did not: idle, or with nobody to go to. They are ended when the time "
            "to move is over, and their clients rebuild them where somebody can run them; then "
            "the blocks leave the memory, too."
        )
    return 0


def run_resume(args: argparse.Namespace) -> int:
    """Carries out ``petalctl resume``; 1 where something else keeps the server away.

    Raises:
        CommandError: the daemon did not answer, or serves nothing.
    """
    with Client(args.socket) as client:
        resumed = client.resume()
    if args.json:
        plain = {
            "lends": not resumed.paused_why,
            "paused_why": resumed.paused_why,
            "is_loading": resumed.is_loading,
        }
        print(json.dumps(plain))
        return 1 if resumed.paused_why else 0
    if resumed.paused_why:
        why = neutralise_line(resumed.paused_why)
        raise CommandError(
            f"your pause is over, but this server stays away by its configuration: {why} "
            "([lend] hours and max_load)",
            code="still_paused",
        )
    if resumed.is_loading:
        print("this server loads its blocks again, and takes sessions then: petalctl status")
    else:
        print("this server takes sessions again")
    return 0
