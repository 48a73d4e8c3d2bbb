"""Links between real daemons that are slow, narrow, hang or break: in user space, without root.

Every daemon announces a port of the emulator instead of its own. Who dials there is found out from
the kernel's table of sockets, so that each *pair* of daemons has a link of its own, through which
the emulator carries the bytes. They are encrypted, and it does not look at them.

    with LinkEmulator() as links, PrivateSwarm(model, spans, links=links) as swarm:
        links.set_link("router", "server 1", latency_s=0.02, bytes_per_s=2e6)
        links.hang_all("server 2")          # a partition; `heal_all` ends it
        links.break_connections("server 3")  # every connection of it is reset, now

Daemons are named as in the swarm. Calls may come from any thread, though not from a trio task.
Bytes of one direction are delivered in order; what is in the kernel's own buffers is beyond the
emulator's reach.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

READ_BYTES = 256 * 1024
QUEUED_PIECES = 64
IDENTIFY_TRIES = 50
START_S = 10.0


@dataclass(eq=False)
class Link:
    """The way between two daemons, both directions alike.

    Attributes:
        latency_s: one way.
        bytes_per_s: of both directions, each.
        flows: unset while the link hangs: nothing flows then, and nothing breaks.
        is_refused: new connections are reset at once.
        carried_bytes: so far.
        connections: made so far.
        open: those that are.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    flows: trio.Event = field(default_factory=trio.Event)
    is_refused: bool = False
    carried_bytes: int = 0
    connections: int = 0
    open: set[_Connection] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.flows.set()

    def set_hung(self, *, is_hung: bool) -> None:
        """Lets nothing flow, or lets all flow again and connections be made."""
        self.is_refused = False
        if not is_hung:
            self.flows.set()
        elif self.flows.is_set():
            self.flows = trio.Event()


class LinkEmulator:
    """See the module; use as a context manager round the swarm."""

    def __init__(self) -> None:
        self._thread = threading.Thread(
            target=trio.run, args=(self._run,), name="links", daemon=True
        )
        self._is_ready = threading.Event()
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery
        self._links: dict[frozenset[str], Link] = {}
        self._pids: dict[str, int] = {}
        self.strangers = 0

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._is_ready.wait(START_S):
            raise TimeoutError("the emulator's thread did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # the thread has told why
            self._do(self._nursery.cancel_scope.cancel)
        self._thread.join()

    # For `PrivateSwarm`.

    def place(self, name: str) -> tuple[str, str]:
        """Makes a place for a daemon: the address to listen on, and the one to announce."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        outer = trio.from_thread.run(self._listen, name, port, trio_token=self._token)
        return f"/ip4/127.0.0.1/tcp/{port}", f"/ip4/127.0.0.1/tcp/{outer}"

    def started(self, name: str, pid: int) -> None:
        """The daemon runs as this process."""
        self._pids[name] = pid

    # For tests and benchmarks.

    def set_link(
        self, one: str, other: str, *, latency_s: float = 0.0, bytes_per_s: float = math.inf
    ) -> None:
        """Sets latency (one way) and bandwidth between two daemons."""

        def act() -> None:
            link = self._link(one, other)
            link.latency_s, link.bytes_per_s = latency_s, bytes_per_s

        self._do(act)

    def hang(self, one: str, other: str) -> None:
        """Lets nothing flow between two daemons; nothing breaks."""
        self._do(lambda: self._link(one, other).set_hung(is_hung=True))

    def heal(self, one: str, other: str) -> None:
        """Ends a hang or a refusal."""
        self._do(lambda: self._link(one, other).set_hung(is_hung=False))

    def hang_all(self, name: str) -> None:
        """Cuts a daemon off from all others."""
        self._set_hung(name, is_hung=True)

    def heal_all(self, name: str) -> None:
        """Brings a daemon back."""
        self._set_hung(name, is_hung=False)

    def break_connections(self, one: str, other: str | None = None) -> int:
        """Resets the open connections of two daemons, or all of one; tells how many."""
        broken = 0

        def act() -> None:
            nonlocal broken
            links = self._links_of(one) if other is None else [self._link(one, other)]
            for connection in [each for link in links for each in link.open]:
                connection.reset()
                broken += 1

        self._do(act)
        return broken

    def refuse(self, one: str, other: str) -> None:
        """Resets every new connection between two daemons, until `heal`."""

        def act() -> None:
            self._link(one, other).is_refused = True

        self._do(act)

    def statistics(self) -> dict[tuple[str, str], tuple[int, int]]:
        """For each pair that has connected, in alphabetical order: bytes and connections."""
        found: dict[tuple[str, str], tuple[int, int]] = {}

        def act() -> None:
            for pair, link in self._links.items():
                one, other = sorted(pair)
                found[one, other] = link.carried_bytes, link.connections

        self._do(act)
        return found

    # On the emulator's thread.

    def _do(self, act: Callable[[], object]) -> None:
        trio.from_thread.run_sync(act, trio_token=self._token)

    def _set_hung(self, name: str, *, is_hung: bool) -> None:
        def act() -> None:
            for link in self._links_of(name):
                link.set_hung(is_hung=is_hung)

        self._do(act)

    async def _run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._is_ready.set()
            await trio.sleep_forever()

    def _link(self, one: str, other: str) -> Link:
        return self._links.setdefault(frozenset((one, other)), Link())

    def _links_of(self, name: str) -> list[Link]:
        return [self._link(name, other) for other in self._pids if other != name]

    async def _listen(self, name: str, port: int) -> int:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        serve = partial(self._serve, name, port)
        self._nursery.start_soon(trio.serve_listeners, serve, listeners)
        return int(listeners[0].socket.getsockname()[1])

    async def _serve(self, name: str, port: int, near: trio.SocketStream) -> None:
        """Carries one connection to the daemon that listens on `port`; trio closes `near` after."""
        try:
            own_port = near.socket.getpeername()[1]
        except OSError:
            return  # it is closed already
        source = await self._identify(own_port)
        if source is None and _socket_inode(own_port) is None:
            _reset(near)  # who dialled has given it up already, or was killed
            return
        if source is None:
            self.strangers += 1
            source = "a stranger"
        link = self._link(source, name)
        if link.is_refused:
            _reset(near)
            return
        await link.flows.wait()
        try:
            far = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            _reset(near)
            return
        async with far:
            link.connections += 1
            connection = _Connection(link, near, far)
            link.open.add(connection)
            try:
                await connection.run()
            finally:
                link.open.discard(connection)

    async def _identify(self, port: int) -> str | None:
        """Which daemon dialled from this port."""
        for _ in range(IDENTIFY_TRIES):
            inode = _socket_inode(port)
            for name, pid in list(self._pids.items()):
                if inode is not None and _owns_socket(pid, inode):
                    return name
            await trio.sleep(0.01)  # the child may be about to be made known
        return None


class _Connection:
    """One connection between two daemons."""

    def __init__(self, link: Link, near: trio.SocketStream, far: trio.SocketStream) -> None:
        self._link = link
        self._near = near
        self._far = far
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Carries until both directions have ended, or it broke."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry, self._near, self._far)
                nursery.start_soon(self._carry, self._far, self._near)

    def reset(self) -> None:
        """Breaks it at both ends, now."""
        _reset(self._near)
        _reset(self._far)
        self._scope.cancel()

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        """One direction, until its end."""
        send, receive = trio.open_memory_channel[tuple[float, bytes]](QUEUED_PIECES)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver, receive, sink)
                async with send:
                    await self._take(source, send)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            self.reset()

    async def _take(
        self, source: trio.SocketStream, pieces: trio.MemorySendChannel[tuple[float, bytes]]
    ) -> None:
        """What comes in, the end too (no bytes), with the time at which it is to come out."""
        free_at = trio.current_time()
        data = b"-"
        while data:
            data = bytes(await source.receive_some(READ_BYTES))
            free_at = max(free_at, trio.current_time()) + len(data) / self._link.bytes_per_s
            await pieces.send((free_at + self._link.latency_s, data))

    async def _deliver(
        self, pieces: trio.MemoryReceiveChannel[tuple[float, bytes]], sink: trio.SocketStream
    ) -> None:
        async for arrives_at, data in pieces:
            await trio.sleep_until(arrives_at)
            await self._link.flows.wait()
            if not data:
                await sink.send_eof()
                return
            await sink.send_all(data)
            self._link.carried_bytes += len(data)


def _reset(stream: trio.SocketStream) -> None:
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    stream.socket.close()


def _socket_inode(port: int) -> str | None:
    """The inode of the socket that is connected from this port of loopback."""
    wanted = f"0100007F:{port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == wanted and fields[9] != "0":
            return fields[9]
    return None


def _owns_socket(pid: int, inode: str) -> bool:
    wanted = f"socket:[{inode}]"
    return any(link == wanted for link in _open_files(pid))


def _open_files(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(file.readlink())
