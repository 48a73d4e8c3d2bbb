"""``petalctl status`` and ``petalctl swarm``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from p2p.wire.control_messages import StatusReport, SwarmReport
from petalctl.client import Client
from petalctl.coverage import block_steps, uncovered_ranges, weakest_ranges


def run_status(args: argparse.Namespace) -> int:
    """Carries out ``petalctl status``.

    Raises:
        CommandError: the daemon did not answer.
    """
    with Client(args.socket) as client:
        report = client.status()
    if args.json:
        print(json.dumps(plain_report(report), indent=2))
    else:
        from petalctl.render import print_rich, render_status

        print_rich(render_status(report), sys.stdout)
    return 0


def run_swarm(args: argparse.Namespace) -> int:
    """Carries out ``petalctl swarm``.

    Raises:
        CommandError: the daemon did not answer, or does not know the model.
    """
    with Client(args.socket) as client:
        report = client.swarm(args.model)
    if args.json:
        print(json.dumps(plain_swarm(report), indent=2))
    else:
        from petalctl.render import print_rich, render_swarm

        print_rich(render_swarm(report), sys.stdout)
    return 0


def plain_report(report: StatusReport | SwarmReport) -> dict[str, Any]:
    """A report as JSON has it."""
    plain = dataclasses.asdict(report)
    del plain["job"]
    return plain


def plain_swarm(report: SwarmReport) -> dict[str, Any]:
    """A swarm report as JSON has it, with what is missing named."""
    plain = plain_report(report)
    for model, swarm in zip(plain["models"], report.models, strict=True):
        steps = block_steps(swarm.servers, swarm.blocks)
        model["uncovered"] = [list(gap) for gap in uncovered_ranges(swarm.coverage)]
        model["steps_per_s"] = steps
        model["weakest"] = [list(weak) for weak in weakest_ranges(steps)]
    return plain
