"""What only the real network must do: processes that die, ports, other libp2p nodes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest
import trio

from p2p.errors import AddressInUse, PeerUnreachable, StreamBroken
from p2p.identity import create_identity
from p2p.libp2p_network import open_libp2p_network
from p2p.network import PeerAddress, Stream
from tests.p2p.test_network import ECHO, LOOPBACK, echo, open_libp2p_networks, receive_exactly

OTHER_PROCESS = """
import trio
from p2p.identity import create_identity
from p2p.libp2p_network import open_libp2p_network

async def echo(stream):
    while data := await stream.receive_some():
        await stream.send_all(data)

async def main():
    async with open_libp2p_network(create_identity(), listen=["/ip4/127.0.0.1/tcp/0"]) as network:
        network.set_handler("/petald/test-echo/1", echo)
        print(f"{network.addresses[0]}/p2p/{network.peer}", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""

LIBP2P_HOST = """
import sys, trio
from libp2p import new_host
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

async def main():
    host = new_host()
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        info = info_from_p2p_addr(Multiaddr(sys.argv[1]))
        await host.connect(info)
        stream = await host.new_stream(info.peer_id, ["/petald/test-echo/1"])
        sent = bytes(range(256)) * 4000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, sent)
            received = b""
            while len(received) < len(sent):
                received += await stream.read(65536)
        print("same" if received == sent else "different", flush=True)

trio.run(main)
"""


@pytest.fixture
def other_process():
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


async def test_a_killed_process_breaks_a_pending_receive(other_process):
    process, address = other_process
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        peer = await network.connect(address)
        stream = await network.open_stream(peer, ECHO)
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        process.kill()
        with trio.fail_after(5), pytest.raises(StreamBroken):
            await stream.receive_some()
        with trio.fail_after(5), pytest.raises(PeerUnreachable):
            await network.open_stream(peer, ECHO)


async def test_a_stopped_process_does_not_hold_up_a_cancelled_send(other_process):
    process, address = other_process
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        peer = await network.connect(address)
        stream = await network.open_stream(peer, ECHO)
        process.send_signal(signal.SIGSTOP)
        try:
            with trio.fail_after(5):
                with trio.move_on_after(0.2) as sending:
                    await stream.send_all(bytes(64 * 1024 * 1024))
                assert sending.cancelled_caught
                await stream.abort()
        finally:
            process.send_signal(signal.SIGCONT)
        again = await network.open_stream(peer, ECHO)
        await again.send_all(b"unharmed")
        assert await receive_exactly(again, 8) == b"unharmed"


async def test_a_peer_that_vanished_without_a_word_is_noticed(other_process, monkeypatch):
    monkeypatch.setattr("p2p.libp2p_muxer.PING_PERIOD_S", 0.2)
    monkeypatch.setattr("p2p.libp2p_muxer.PING_DEADLINE_S", 0.2)
    process, address = other_process
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        stream = await network.open_stream(await network.connect(address), ECHO)
        process.send_signal(signal.SIGSTOP)
        with trio.fail_after(10), pytest.raises(StreamBroken):
            await stream.receive_some()


async def test_a_reader_may_pause_for_longer_than_upstreams_five_seconds():
    go_on = trio.Event()

    async def read_late(stream: Stream) -> None:
        await go_on.wait()
        await receive_exactly(stream, 4 * 1024 * 1024)
        await stream.send_all(b"done")

    async with open_libp2p_networks(2) as (a, b):
        b.set_handler(ECHO, read_late)
        stream = await a.open_stream(b.peer, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(4 * 1024 * 1024))
            await trio.sleep(6)
            go_on.set()
            assert await receive_exactly(stream, 4) == b"done"


async def test_an_unmodified_py_libp2p_host_talks_with_this_network():
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        network.set_handler(ECHO, echo)
        address = f"{network.addresses[0]}/p2p/{network.peer}"
        with trio.fail_after(30):
            result = await trio.run_process(
                [sys.executable, "-c", LIBP2P_HOST, address],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        assert result.stdout == b"same\n", result.stderr.decode()[-2000:]


async def test_a_peer_can_be_reached_at_once_after_failed_dials():
    identity = create_identity()
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = [f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"]
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        network.learn(PeerAddress(identity.peer, tuple(listen)))
        for _ in range(2):
            with pytest.raises(PeerUnreachable):
                await network.open_stream(identity.peer, ECHO)
        async with open_libp2p_network(identity, listen=listen) as other:
            other.set_handler(ECHO, echo)
            stream = await network.open_stream(identity.peer, ECHO)
            await stream.send_all(b"back")
            assert await receive_exactly(stream, 4) == b"back"


async def test_a_port_in_use_is_said_so():
    async with open_libp2p_network(create_identity(), listen=LOOPBACK) as network:
        with pytest.raises(AddressInUse, match="another port"):
            async with open_libp2p_network(create_identity(), listen=network.addresses):
                pass
