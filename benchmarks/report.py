"""What every benchmark tells: the machine, the median with its spread, and a file of results."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"


def describe_machine() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def write_results(
    name: str, machine: Mapping[str, object], args: argparse.Namespace, results: object
) -> None:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    document = {"machine": machine, "arguments": vars(args), "results": results}
    file.write_text(json.dumps(document, indent=1))
    print(f"\nwritten to {file}")
