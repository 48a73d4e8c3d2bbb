"""`petalctl drain`, typed as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from petalctl.client import Client
from petalctl.private_swarm import PrivateSwarm
from tests.swarm.conftest import even_spans

pytestmark = [pytest.mark.swarm, pytest.mark.model, pytest.mark.timeout(300)]


def petalctl(socket: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "petalctl", "--socket", str(socket), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_server_is_drained_and_taken_back(model_folder: Path) -> None:
    with PrivateSwarm(str(model_folder), spans=even_spans(2) * 2, threads=1) as swarm:
        with swarm.client() as client:
            expected = client.generate(prompt="Once", max_new_tokens=120).result().tokens
            generation = client.generate(prompt="Once", max_new_tokens=120)
            for _ in zip(range(20), generation, strict=False):
                pass
            peers = {}
            for server in swarm.servers:
                with Client(server.socket) as own:
                    peers[own.status().peer] = server
            leaver = peers[generation.chain[0].peer]
            done = petalctl(leaver.socket, "drain", "--json")
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(done.stdout) == {"sessions": 1, "left": 0}
            result = generation.result()
            assert result.tokens == expected
            assert "leaving" in [move.reason for move in result.moves]
            with Client(leaver.socket) as own:
                span = own.status().span
            assert span is not None
            assert (span.state, span.sessions) == ("draining", 0)
            again = petalctl(leaver.socket, "drain", "--undo")
            assert (again.returncode, again.stdout) == (0, "this server takes sessions again\n")
            with Client(leaver.socket) as own:
                span = own.status().span
            assert span is not None
            assert span.state == "serving"
        # Who serves nothing is told so.
        refused = petalctl(swarm.router.socket, "drain")
        assert refused.returncode == 1
        assert "serves no blocks" in refused.stderr


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
