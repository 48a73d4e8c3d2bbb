"""A server that lends only what is idle: real daemons, a real competing load."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from petalctl.client import Client
from petalctl.daemon_process import DaemonProcess
from petalctl.private_swarm import PrivateSwarm
from tests.swarm.conftest import even_spans

pytestmark = [pytest.mark.swarm, pytest.mark.model, pytest.mark.timeout(300)]

BURN = "f = open('/dev/zero', 'rb', 0); b = bytearray(1 << 20)\nwhile 1: f.readinto(b)"
"""A load in the kernel, which counts as others' use even where the tests run with lowered priority,
and this with them."""

BURNERS_PER_PROCESSOR = 4
"""Most of the machine is theirs, then, even while others compute on it. A generation alone, whose
hops take turns, uses half of two processors."""

LEND = {"max_load": 0.6, "busy_s": 2.0, "idle_s": 3.0, "yield_within_s": 60.0}


def petalctl(socket: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "petalctl", "--socket", str(socket), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@contextmanager
def busy_owner() -> Iterator[None]:
    """Somebody uses the machine; the processes are ended with the block."""
    count = BURNERS_PER_PROCESSOR * (os.cpu_count() or 1)
    burners = [
        # In sessions of their own, among which Linux shares (sched(7), autogroup).
        subprocess.Popen([sys.executable, "-c", BURN], start_new_session=True)
        for _ in range(count)
    ]
    try:
        for burner in burners:
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, burner.pid, 0)
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def span_state(server: DaemonProcess) -> str | None:
    """None where no blocks are in memory."""
    with Client(server.socket) as own:
        span = own.status().span
    return None if span is None else span.state


def swarm_states(swarm: PrivateSwarm) -> dict[str, str]:
    """By peer, as `petalctl swarm` tells it on the machine that routes."""
    said = petalctl(swarm.router.socket, "swarm", "--json")
    assert said.returncode == 0, said.stderr
    servers = json.loads(said.stdout)["models"][0]["servers"]
    return {server["peer"]: server["state"] for server in servers}


def peer_of(server: DaemonProcess) -> str:
    with Client(server.socket) as own:
        return own.status().peer


def wait_state(server: DaemonProcess, state: str, within_s: float = 60.0) -> None:
    ends_at = time.monotonic() + within_s
    while span_state(server) != state:
        assert time.monotonic() < ends_at, f"the {server.name} is not {state}{server.quote_log()}"
        time.sleep(0.2)


def wait_left(server: DaemonProcess, within_s: float = 60.0) -> None:
    ends_at = time.monotonic() + within_s
    with Client(server.socket) as own:
        while (span := own.status().span) is not None and span.sessions:
            assert time.monotonic() < ends_at, f"the {server.name} keeps {span.sessions} sessions"
            time.sleep(0.2)


def wait_swarm_state(swarm: PrivateSwarm, peer: str, state: str, within_s: float = 30.0) -> None:
    ends_at = time.monotonic() + within_s
    while (said := swarm_states(swarm)).get(peer) != state:
        assert time.monotonic() < ends_at, f"{peer} is not {state} in {said}"
        time.sleep(0.5)


def test_a_server_makes_way_for_a_competing_load_and_comes_back(model_folder: Path) -> None:
    first, second = even_spans(2)
    with PrivateSwarm(str(model_folder), spans=[first, second], threads=1) as swarm:
        spare = swarm.servers[0]
        # The only one that looks; the others on this machine are where its sessions can go.
        lender = swarm.add_server(first, lend=LEND)
        assert petalctl(spare.socket, "pause").returncode == 0  # so that the lender is chosen
        swarm.wait_covered()
        peer = peer_of(lender)
        wait_state(lender, "serving")
        with swarm.client() as client:
            expected = client.generate(prompt="Once", max_new_tokens=100).result().tokens
            generation = client.generate(prompt="Once", max_new_tokens=100)
            for _ in zip(range(5), generation, strict=False):
                pass
            assert generation.chain[0].peer == peer
            assert petalctl(spare.socket, "resume").returncode == 0
            with busy_owner():
                wait_state(lender, "paused")
                status = petalctl(lender.socket, "status")
                assert "others use more than 60% of its device" in status.stdout
                wait_swarm_state(swarm, peer, "leaving")
                wait_left(lender)
            result = generation.result()
            assert result.tokens == expected
            assert "leaving" in [move.reason for move in result.moves]
            assert peer not in [hop.peer for hop in result.chain]
            wait_state(lender, "serving")
            wait_swarm_state(swarm, peer, "serving")


def resident_bytes(server: DaemonProcess) -> int:
    with Client(server.socket) as own:
        return int(psutil.Process(own.status().pid).memory_info().rss)


def test_the_owner_pauses_and_resumes(model_folder: Path) -> None:
    with PrivateSwarm(str(model_folder), spans=even_spans(2) * 2, threads=1) as swarm:
        with swarm.client() as client:
            expected = client.generate(prompt="Once", max_new_tokens=120).result().tokens
            generation = client.generate(prompt="Once", max_new_tokens=120)
            peers = {peer_of(server): server for server in swarm.servers}
            for _ in zip(range(10), generation, strict=False):
                pass
            leaver = peers[generation.chain[0].peer]
            before = resident_bytes(leaver)
            with Client(leaver.socket) as own:
                span = own.status().span
            assert span is not None
            paused = petalctl(leaver.socket, "pause", "for", "2h", "--json")
            assert (paused.returncode, paused.stderr) == (0, "")
            assert json.loads(paused.stdout) == {"sessions": 1, "left": 0, "for_s": 7200}
            result = generation.result()
            assert result.tokens == expected
            assert "leaving" in [move.reason for move in result.moves]
            status = petalctl(leaver.socket, "status").stdout
            assert "paused, no blocks in memory" in status
            assert "its owner paused it; for 1 h 59 min more" in status
            assert before - resident_bytes(leaver) > 0.8 * span.weight_bytes
            wait_swarm_state(swarm, peer_of(leaver), "leaving")
            again = petalctl(leaver.socket, "resume")
            assert again.returncode == 0
            assert "loads its blocks again" in again.stdout
            wait_state(leaver, "serving")
            wait_swarm_state(swarm, peer_of(leaver), "serving")
        # Who serves nothing is told so.
        for command in ("pause", "resume"):
            refused = petalctl(swarm.router.socket, command)
            assert refused.returncode == 1
            assert "serves no blocks" in refused.stderr
