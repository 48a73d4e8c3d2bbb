from __future__ import annotations

import pytest
import trio

from p2p.memory_network import open_memory_hub
from p2p.network import Stream
from petald.lively_stream import LivelyStream


@pytest.mark.parametrize("size", [0, 10, 65536, 200_001])
async def test_bytes_are_carried_and_every_chunk_is_a_sign_of_life(size: int) -> None:
    signs: list[str] = []
    received: list[bytes] = []
    data = bytes(i % 251 for i in range(size))

    async def take(stream: Stream) -> None:
        lively = LivelyStream(stream, lambda: signs.append("in"))
        while part := await lively.receive_some():
            received.append(part)
        await lively.send_all(b"end")

    async with open_memory_hub() as hub:
        one, other = hub.make_network(), hub.make_network()
        other.set_handler("/test/1", take)
        stream = LivelyStream(
            await one.open_stream(other.peer, "/test/1"), lambda: signs.append("out")
        )
        assert stream.remote_peer == other.peer
        await stream.send_all(data)
        assert signs.count("out") == max(1, -(-size // 65536))
        await stream.aclose()
        with trio.fail_after(5):
            while b"".join(received) != data:  # noqa: ASYNC110  # nothing tells of it
                await trio.sleep(0.01)
    assert signs.count("in") >= len(received)
