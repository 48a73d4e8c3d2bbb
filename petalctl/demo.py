"""``petalctl demo``: a private swarm that speaks, to be seen on any machine with one command.

The answer goes to standard output, all that is told about it to standard error.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from kernels.errors import KernelError
from kernels.model_fingerprint import read_json_object
from kernels.model_store import ModelFolder, UnknownModel, find_model
from p2p.wire.control_messages import GenerateDone
from petalctl.client import Client
from petalctl.daemon_process import DaemonProcess
from petalctl.errors import CommandError, JobError
from petalctl.generate_command import (
    EXIT_INTERRUPTED,
    conversation,
    describe_speed,
    is_cancelled,
)
from petalctl.interrupts import on_first_interrupt
from petalctl.kept_swarm import find_kept, stop_kept
from petalctl.models import block_count
from petalctl.names import shorten_peers
from petalctl.private_swarm import STOP_TIMEOUT_S, PrivateSwarm, split_blocks
from petalctl.terminal import AnswerWriter, neutralise_line, tell

LABEL_WIDTH = 8


def run_demo(args: argparse.Namespace) -> int:
    """Carries out ``petalctl demo``.

    Raises:
        CommandError: it could not; nothing of the swarm is left.
    """
    if args.stop_folder is not None:
        return _stop(args.stop_folder)
    if not args.prompt.strip():
        raise CommandError("the prompt is empty; give some text", code="usage", exit_status=2)
    model = _find_or_pull(args.model)
    blocks = _count_blocks(model)
    spans = split_blocks(blocks, args.servers)
    _say("model", f"{model.name}, {blocks} blocks")
    started_at = time.monotonic()

    def on_ready(daemon: DaemonProcess) -> None:
        holds = f"blocks {daemon.span[0]}:{daemon.span[1]}" if daemon.span else ""
        after = f"ready after {time.monotonic() - started_at:4.1f} s"
        _say("", f"{daemon.name:<10}  pid {daemon.pid:<8} {after}  {holds}".rstrip())

    _say("swarm", f"an anchor, {args.servers} servers and a router, each a process on loopback")
    with PrivateSwarm(
        str(model.path),
        spans,
        threads=args.threads or _choose_threads(args.servers),
        is_kept=args.keep,
        on_ready=on_ready,
    ) as swarm:
        swarm.wait_covered()
        status = _speak(swarm, args)
        if args.keep and status == 0:
            _explain_kept(swarm)
        elif args.keep:
            swarm.stop()
    if not args.keep:
        _say("swarm", "ended; nothing of it is left")
    return status


def _find_or_pull(name: str) -> ModelFolder:
    try:
        return find_model(name)
    except UnknownModel:
        from petalctl.models_pull import PullRequest, pull_model

        _say("model", f"{name} is not here yet; fetching it")
        return pull_model(PullRequest(what=name))


def _count_blocks(model: ModelFolder) -> int:
    try:
        blocks = block_count(read_json_object(model.path / "config.json"))
    except KernelError as error:
        raise CommandError(str(error), code=error.code) from error
    if not blocks:
        raise CommandError(
            f"the configuration of {model.name} does not say how many blocks it has",
            code="unsupported_model",
        )
    return blocks


def _choose_threads(servers: int) -> int:
    """So many for each that all of them together do not ask for more than there are.

    They work in turn, but threads that wait for work spin for a while, at the cost of the others.
    """
    return max(1, len(os.sched_getaffinity(0)) // servers)


def _speak(swarm: PrivateSwarm, args: argparse.Namespace) -> int:
    _say("prompt", args.prompt)
    tell("")
    writer = AnswerWriter(sys.stdout)
    with (
        swarm.client() as client,
        client.generate(
            turns=conversation(None, args.prompt), max_new_tokens=args.max_new_tokens
        ) as generation,
        on_first_interrupt(generation.stop) as interrupt,
    ):
        try:
            for piece in generation:
                writer.write(piece)
        except (JobError, KeyboardInterrupt) as error:
            writer.end_line()
            if interrupt.has_come and is_cancelled(error):
                return EXIT_INTERRUPTED
            raise
        writer.end_line()
        done = generation.result()
    tell("")
    _explain_chain(swarm, done)
    _say("speed", describe_speed(done))
    return 0


def _explain_chain(swarm: PrivateSwarm, done: GenerateDone) -> None:
    """Which processes the answer crossed, and where its time went."""
    daemons: dict[str, DaemonProcess] = {}
    for server in swarm.servers:
        with Client(server.socket) as client:
            daemons[client.status().peer] = server
    steps = max(1, len(done.tokens) - 1)
    compute_s = done.timings.hop_compute_s
    names = shorten_peers(hop.peer for hop in done.chain)
    for index, hop in enumerate(done.chain):
        server_name = daemons[hop.peer].name if hop.peer in daemons else "a stranger"
        text = f"hop {index + 1}: blocks {hop.start}:{hop.end} at {server_name} ({names[hop.peer]})"
        if index < len(compute_s) and compute_s[index] > 0:
            text += f", {compute_s[index] / steps * 1e3:.1f} ms a step"
        _say("chain" if index == 0 else "", text)


def _explain_kept(swarm: PrivateSwarm) -> None:
    router_socket = shlex.quote(str(swarm.router.socket))
    _say("swarm", "it goes on running")
    _say("use it", f"export PETALD_SOCKET={router_socket}")
    _say("", "petalctl chat        (or generate, status, swarm)")
    _say("stop it", f"petalctl demo --stop {shlex.quote(str(swarm.folder))}")


def _stop(folder: str) -> int:
    if not folder:
        found = find_kept()
        if len(found) != 1:
            listing = "; ".join(f"petalctl demo --stop {shlex.quote(str(one))}" for one in found)
            raise CommandError(
                f"several swarms run; say which: {listing}" if found else "no kept swarm is here",
                code="no_such_swarm",
            )
        folder = str(found[0])
    count = stop_kept(Path(folder), STOP_TIMEOUT_S)
    _say("swarm", f"ended {count} processes, and removed {folder}")
    return 0


def _say(label: str, text: str) -> None:
    shown = neutralise_line(text)
    print(f"{label:<{LABEL_WIDTH}} {shown}", file=sys.stderr, flush=True)
