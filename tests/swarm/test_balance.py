"""Real daemons that choose their blocks themselves, close gaps, and move under running jobs."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.link_emulator import LinkEmulator
from kernels.checkpoint import Checkpoint
from kernels.kv_cache import CacheArena
from kernels.layer_loader import block_bytes
from p2p.wire.control_messages import GenerateDone, Progress, ServerStatus
from petalctl.client import Client
from petalctl.daemon_process import DaemonProcess
from petalctl.private_swarm import PrivateSwarm, Value
from tests.swarm.conftest import wait_until_free

pytestmark = [pytest.mark.swarm, pytest.mark.model, pytest.mark.timeout(400)]

PROMPT = "Once upon a time, in a small village by the sea,"
CACHE_TOKENS = 2048
FIT = 10


def room_for(model_folder: Path, blocks: int) -> dict[str, Value]:
    """Settings for servers with room for so many blocks each."""
    config = Checkpoint(model_folder).config
    one_block = block_bytes(config, 0, dtype=torch.float32, quant="none")
    one_block += CacheArena.bytes_per_block(
        config, capacity_tokens=CACHE_TOKENS, dtype=torch.float32
    )
    return {"cache_tokens": CACHE_TOKENS, "memory_bytes": int(one_block * (blocks + 0.5))}


@pytest.fixture(scope="module")
def room(model_folder: Path) -> dict[str, Value]:
    return room_for(model_folder, FIT)


def spans_of(servers: Sequence[DaemonProcess]) -> dict[str, tuple[int, int]]:
    """Each server's peer, with its blocks by its own word."""
    found = {}
    for server in servers:
        with Client(server.socket) as own:
            status = own.status()
        assert status.span is not None
        found[status.peer] = (status.span.start, status.span.end)
    return found


def uncovered(spans: dict[str, tuple[int, int]]) -> set[int]:
    return set(range(30)) - {block for span in spans.values() for block in range(*span)}


def serving(swarm: PrivateSwarm) -> list[ServerStatus]:
    with swarm.client() as client:
        (model,) = client.swarm(swarm.model).models
    return [server for server in model.servers if server.state == "serving"]


def test_servers_cover_the_model_close_gaps_and_move_under_a_job(
    model_folder: Path, room: dict[str, Value]
) -> None:
    with PrivateSwarm(str(model_folder), spans=[], threads=1, route={"max_wait_s": 200.0}) as swarm:
        servers = swarm.add_free_servers(6, **room)
        spans = spans_of(servers)
        assert all(end - start <= FIT for start, end in spans.values())
        swarm.wait_covered(timeout_s=60.0)
        spans = spans_of(servers)
        assert not uncovered(spans), spans
        with swarm.client() as client:
            undisturbed = client.generate(prompt=PROMPT, max_new_tokens=200).result()

        # All servers of some blocks go: the others must make up for them.
        by_peer = dict(zip(spans, servers, strict=True))
        victims = _smallest_cut(spans)
        assert len(victims) <= 2, spans
        for peer in victims:
            os.kill(by_peer[peer].pid, signal.SIGKILL)
        left = [server for peer, server in by_peer.items() if peer not in victims]
        assert uncovered(spans_of(left))
        with swarm.client() as client:
            waiting = client.generate(prompt=PROMPT, max_new_tokens=200)
            result = waiting.result()
        assert result.tokens == undisturbed.tokens
        assert not uncovered(spans_of(left))
        wait_until_free(swarm)

        # Two more join under a running job.
        results: list[GenerateDone] = []

        def generate() -> None:
            with swarm.client() as client:
                results.append(client.generate(prompt=PROMPT, max_new_tokens=200).result())

        job = threading.Thread(target=generate)
        job.start()
        joined = swarm.add_free_servers(2, **room)
        job.join()
        assert results[0].tokens == undisturbed.tokens
        assert not uncovered(spans_of([*left, *joined]))


def _smallest_cut(spans: dict[str, tuple[int, int]]) -> set[str]:
    """The fewest servers without which some block has none."""
    holders = [
        {peer for peer, (start, end) in spans.items() if start <= block < end}
        for block in range(30)
    ]
    return min(holders, key=len)


def test_servers_that_come_one_after_the_other_cover_the_model(
    model_folder: Path, room: dict[str, Value]
) -> None:
    with PrivateSwarm(str(model_folder), spans=[], threads=1) as swarm:
        servers: list[DaemonProcess] = []
        for _ in range(4):
            started_at = time.monotonic()
            servers += swarm.add_free_servers(1, **room)
            assert time.monotonic() - started_at < 60
        # The second may leave pieces on both sides of it: three would have to fit exactly.
        assert not uncovered(spans_of(servers))
        swarm.wait_covered()


def test_a_server_that_moves_does_not_disturb_the_generation_that_it_runs(
    model_folder: Path,
) -> None:
    later = {"server 3", "server 4"}
    names = ["router", "server 1", "server 2", *sorted(later)]
    pairs = list(itertools.combinations(names, 2))
    with (
        LinkEmulator() as links,
        PrivateSwarm(str(model_folder), spans=[(0, 15)], threads=1, links=links) as swarm,
        swarm.client() as client,
    ):
        (mover,) = swarm.add_free_servers(1, **room_for(model_folder, 15))
        ((peer, span),) = spans_of([mover]).items()
        assert span == (15, 30)
        swarm.wait_covered()
        # A move takes up to a minute: its claim is to be known. Slow links let a job last. Those
        # who come later are far away, so that no session goes to them before it has to, however
        # slow this machine makes the mover look.
        for pair in pairs:
            links.set_link(*pair, latency_s=0.04 if later.isdisjoint(pair) else 0.15)
        news: list[Progress] = []
        generation = client.generate(
            prompt=PROMPT, max_new_tokens=1500, temperature=0.0, on_progress=news.append
        )
        events = generation.events()
        while not generation.tokens:
            next(events)
        assert generation.chain[-1].peer == peer
        # Two more take the mover's blocks: half of the model has three servers, half has one.
        for _ in range(2):
            swarm.add_server((15, 30))
        while not (leaving := [one for item in news if (one := item.move) and peer in one.old]):
            next(events)
        until = len(generation.tokens) + 40
        while len(generation.tokens) < until:
            next(events)
        tokens = generation.tokens
        generation.close()
        # On a busy machine the session may go on to the third server of these blocks later.
        (move,) = leaving
        assert (move.start, move.end) == (15, 30)
        assert (move.old, move.reason) == ((peer,), "leaving")
        assert move.handed_over_tokens + move.replayed_tokens > 0
        assert spans_of([mover]) == {peer: (0, 15)}

        for pair in pairs:
            links.set_link(*pair)
        undisturbed = client.generate(
            prompt=PROMPT, max_new_tokens=len(tokens), temperature=0.0
        ).result()
        assert tokens == undisturbed.tokens
