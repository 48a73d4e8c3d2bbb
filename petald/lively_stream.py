"""A stream that tells when its other end shows life: when bytes came, or could be sent.

A large message takes long on a home's uplink. Whoever waits for the answer sees by this that it is
on its way, and does not take a slow link for a dead peer.
"""

from __future__ import annotations

from collections.abc import Callable

from p2p.network import Stream

CHUNK_BYTES = 64 * 1024
"""Half a second on an uplink of a megabit a second."""


class LivelyStream:
    """A `p2p.network.Stream` round another one.

    Args:
        stream: the other one, owned by this from now on.
        on_life: called at each sign of life; must not block.
    """

    def __init__(self, stream: Stream, on_life: Callable[[], None]) -> None:
        self._stream = stream
        self._on_life = on_life

    @property
    def remote_peer(self) -> str:
        """The peer id that the other end proved to own."""
        return self._stream.remote_peer

    @property
    def remote_host(self) -> str:
        """As of the stream."""
        return self._stream.remote_host

    async def send_all(self, data: bytes) -> None:
        """Sends everything, a chunk at a time."""
        if len(data) <= CHUNK_BYTES:
            await self._stream.send_all(data)
            self._on_life()
            return
        view = memoryview(data)
        for first in range(0, len(data), CHUNK_BYTES):
            await self._stream.send_all(bytes(view[first : first + CHUNK_BYTES]))
            self._on_life()

    async def receive_some(self) -> bytes:
        """Gives at least one byte; none after the other end's close."""
        data = await self._stream.receive_some()
        self._on_life()
        return data

    async def aclose(self) -> None:
        """Ends the stream in order."""
        await self._stream.aclose()

    async def abort(self) -> None:
        """Ends the stream at once."""
        await self._stream.abort()
