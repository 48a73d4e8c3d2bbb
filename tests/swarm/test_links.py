"""The link emulator itself, and what petald makes of links that are cut, broken and slow."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.link_emulator import LinkEmulator
from p2p.round_trips import KEPT
from petalctl.client import Client, Generation
from petalctl.private_swarm import PrivateSwarm
from tests.swarm.conftest import even_spans, wait_until_free

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]

PROMPT = "Once upon a time, in a small village by the sea,"
NEW_TOKENS = 128


@pytest.fixture(scope="module")
def links() -> Iterator[LinkEmulator]:
    with LinkEmulator() as links:
        yield links


@pytest.fixture(scope="module")
def swarm(model_folder: Path, links: LinkEmulator) -> Iterator[PrivateSwarm]:
    with PrivateSwarm(str(model_folder), spans=even_spans(3) * 2, threads=1, links=links) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def expected(swarm: PrivateSwarm) -> tuple[int, ...]:
    with swarm.client() as client:
        return client.generate(prompt=PROMPT, max_new_tokens=NEW_TOKENS).result().tokens


@pytest.fixture
def client(swarm: PrivateSwarm, links: LinkEmulator) -> Iterator[Client]:
    with swarm.client() as client:
        yield client
    for daemon in swarm.daemons:
        links.heal_all(daemon.name)
    wait_until_free(swarm)


def names(swarm: PrivateSwarm, generation: Generation) -> list[str]:
    """The daemons of a generation's chain."""
    known = {}
    for server in swarm.servers:
        with Client(server.socket) as own:
            known[own.status().peer] = server.name
    return [known[hop.peer] for hop in generation.chain]


def begin(client: Client, tokens: int) -> Generation:
    generation = client.generate(prompt=PROMPT, max_new_tokens=NEW_TOKENS)
    for _ in generation.events():
        if len(generation.tokens) >= tokens:
            break
    return generation


def test_a_relay_delays_narrows_hangs_and_breaks() -> None:
    with LinkEmulator() as links, socket.socket() as listener:
        listen, announce = links.place("here")
        links.started("here", os.getpid())
        listener.bind(("127.0.0.1", int(listen.rpartition("/")[2])))
        listener.listen()
        near = socket.create_connection(("127.0.0.1", int(announce.rpartition("/")[2])))
        far, _ = listener.accept()
        near.settimeout(20)
        far.settimeout(20)

        def cross(size: int) -> float:
            started_at = time.monotonic()
            threading.Thread(target=near.sendall, args=(bytes(size),), daemon=True).start()
            left = size
            while left:
                left -= len(far.recv(left))
            return time.monotonic() - started_at

        quick_s = cross(100_000)
        links.set_link("here", "here", latency_s=0.2)
        assert cross(10) >= 0.2 > quick_s
        links.set_link("here", "here", bytes_per_s=200_000)
        assert cross(100_000) >= 0.4
        links.set_link("here", "here")
        links.hang("here", "here")
        near.sendall(b"x")
        far.settimeout(0.3)
        with pytest.raises(TimeoutError):
            far.recv(1)
        links.heal("here", "here")
        far.settimeout(20)
        assert far.recv(1) == b"x"
        links.break_connections("here", "here")
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        near.close()
        far.close()


def test_the_end_closes_connections_that_were_not_passed_on_yet() -> None:
    with socket.socket() as near:
        near.settimeout(20)
        with LinkEmulator() as links:
            _, announce = links.place("here")
            links.started("here", os.getpid())
            links.hang("here", "here")
            near.connect(("127.0.0.1", int(announce.rpartition("/")[2])))
            time.sleep(0.2)  # it waits for the link then
        assert near.recv(1) == b""


@pytest.mark.model
def test_every_pair_of_a_chain_goes_through_the_emulator(
    swarm: PrivateSwarm, links: LinkEmulator, client: Client, expected: tuple[int, ...]
) -> None:
    before = links.statistics()
    generation = client.generate(prompt=PROMPT, max_new_tokens=NEW_TOKENS)
    assert generation.result().tokens == expected
    chain = names(swarm, generation)
    for pair in [*itertools.pairwise(chain), *(("router", name) for name in chain)]:
        one, other = sorted(pair)
        carried = links.statistics()[one, other][0] - before.get((one, other), (0, 0))[0]
        assert carried > NEW_TOKENS * 576 * 4, f"{one} and {other} found another way"
    assert links.strangers == 0


@pytest.mark.model
def test_a_slow_link_is_measured(swarm: PrivateSwarm, links: LinkEmulator, client: Client) -> None:
    slow = swarm.servers[0].name
    links.set_link("router", slow, latency_s=0.03)
    with Client(swarm.servers[0].socket) as own:
        peer = own.status().peer
    for _ in range(KEPT):  # the least of the last few counts
        (model,) = client.swarm().models
    (server,) = [server for server in model.servers if server.peer == peer]
    links.set_link("router", slow)
    assert server.round_trip_s is not None
    assert server.round_trip_s >= 0.06


@pytest.mark.model
@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_partition_that_heals(
    swarm: PrivateSwarm,
    links: LinkEmulator,
    client: Client,
    expected: tuple[int, ...],
    hop: int,
) -> None:
    generation = begin(client, 10 + 20 * hop)
    part = generation.chain[hop]
    cut = names(swarm, generation)[hop]
    links.hang_all(cut)
    timer = threading.Timer(2.0, links.heal_all, [cut])
    timer.start()
    result = generation.result()
    timer.join()
    assert result.tokens == expected
    assert any(m.start <= part.start and part.end <= m.end for m in result.moves), result.moves


@pytest.mark.model
@pytest.mark.parametrize("kind", ["hang", "break"])
def test_two_servers_that_lose_each_other(
    swarm: PrivateSwarm,
    links: LinkEmulator,
    client: Client,
    expected: tuple[int, ...],
    kind: str,
) -> None:
    generation = begin(client, 30)
    chain = names(swarm, generation)
    if kind == "hang":
        links.hang(chain[0], chain[1])
    else:
        links.break_connections(chain[0], chain[1])
    assert generation.result().tokens == expected


@pytest.mark.model
def test_a_client_that_loses_all_its_connections(
    swarm: PrivateSwarm, links: LinkEmulator, client: Client, expected: tuple[int, ...]
) -> None:
    generation = begin(client, 40)
    links.break_connections("router")
    assert generation.result().tokens == expected


@pytest.mark.model
def test_a_client_that_is_cut_off_for_a_while(
    swarm: PrivateSwarm, links: LinkEmulator, client: Client, expected: tuple[int, ...]
) -> None:
    generation = begin(client, 40)
    links.hang_all("router")
    timer = threading.Timer(4.0, links.heal_all, ["router"])
    timer.start()
    result = generation.result()
    timer.join()
    assert result.tokens == expected
