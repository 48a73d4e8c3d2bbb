"""`petalctl generate --show-chain`, typed as a person types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from petalctl.client import Client
from petalctl.private_swarm import PrivateSwarm
from tests.swarm.conftest import even_spans

pytestmark = [pytest.mark.swarm, pytest.mark.model, pytest.mark.timeout(300)]


def test_the_chain_is_told_as_it_changes(model_folder: Path) -> None:
    with PrivateSwarm(str(model_folder), spans=even_spans(2) * 2, threads=1) as swarm:
        swarm.wait_covered()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "petalctl", "--socket", str(swarm.router.socket)),
                *("generate", "--raw", "--show-chain", "--max-new-tokens", "150", "Once upon"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        chain = process.stderr.readline()
        assert chain.startswith("chain: ")
        assert process.stdout is not None
        process.stdout.read(20)
        for server in swarm.servers:
            with Client(server.socket) as own:
                if own.status().peer[-6:] in chain.partition("→")[0]:
                    server.kill()
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0
        moved = next(line for line in told.splitlines() if "moved" in line)
        assert moved.startswith("blocks 0:15 moved from …")
        assert " ms" in moved
        assert "stream broken" in moved
