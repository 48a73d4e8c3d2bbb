"""Streams that stay in this process: a pair of ends, each the other's remote.

Used where a peer opens a stream to itself, and by the network in memory, which puts links between.
Buffers are bounded, as a network's are.
"""

from __future__ import annotations

import trio

from p2p.errors import StreamBroken

WINDOW_BYTES = 256 * 1024
"""What one end may have sent before the other has read it: yamux's window."""


class _Direction:
    """Bytes on their way from one end to the other."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.has_ended = False
        self.is_broken = False
        self.changed = trio.Event()

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class PipeStream:
    """One end; made by `make_pipe`.

    Attributes:
        remote_host: empty, as within one process, until somebody says otherwise.
    """

    remote_host: str = ""

    def __init__(self, remote_peer: str, incoming: _Direction, outgoing: _Direction) -> None:
        self._remote_peer = remote_peer
        self._incoming = incoming
        self._outgoing = outgoing

    @property
    def remote_peer(self) -> str:
        """The peer at the other end."""
        return self._remote_peer

    async def send_all(self, data: bytes) -> None:
        """As `p2p.network.Stream.send_all`."""
        out = self._outgoing
        view = memoryview(data)
        await trio.lowlevel.checkpoint()
        while True:
            if out.is_broken or out.has_ended:
                raise StreamBroken(f"the stream to {self._remote_peer} is gone")
            room = WINDOW_BYTES - len(out.buffer)
            if room > 0 and view:
                out.buffer += view[:room]
                view = view[room:]
                out.wake()
            if not view:
                return
            await out.changed.wait()

    async def receive_some(self) -> bytes:
        """As `p2p.network.Stream.receive_some`."""
        into = self._incoming
        await trio.lowlevel.checkpoint()
        while True:
            if into.is_broken:
                raise StreamBroken(f"the stream from {self._remote_peer} is gone")
            if into.buffer:
                data = bytes(into.buffer)
                into.buffer.clear()
                into.wake()
                return data
            if into.has_ended:
                return b""
            await into.changed.wait()

    async def aclose(self) -> None:
        """As `p2p.network.Stream.aclose`."""
        self._outgoing.has_ended = True
        self._outgoing.wake()
        # What comes from now on is read by nobody: the other end must not wait for room.
        if not self._incoming.has_ended:
            self._incoming.is_broken = True
            self._incoming.wake()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def end_sending(self) -> None:
        """Ends the sending side in order; receiving goes on."""
        self._outgoing.has_ended = True
        self._outgoing.wake()
        await trio.lowlevel.checkpoint()

    async def abort(self) -> None:
        """As `p2p.network.Stream.abort`."""
        self.break_nowait()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def break_nowait(self) -> None:
        """Breaks both directions at once."""
        for direction in (self._incoming, self._outgoing):
            direction.is_broken = True
            direction.buffer.clear()
            direction.wake()


def make_pipe(one: str, other: str) -> tuple[PipeStream, PipeStream]:
    """Both ends of a stream between two peers: the first is ``one``'s."""
    forth, back = _Direction(), _Direction()
    return PipeStream(other, back, forth), PipeStream(one, forth, back)
