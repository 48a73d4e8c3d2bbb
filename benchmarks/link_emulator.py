"""Links between real daemons that are slow, narrow, hang or break: in user space, without root.

Every daemon announces a port of the emulator instead of its own. Who dials there is found out from
the kernel's table of sockets, so that each *pair* of daemons has a link of its own, through which
the emulator carries the bytes. They are encrypted, and it does not look at them.

    with LinkEmulator() as links, PrivateSwarm(model, spans, links=links) as swarm:
        links.set_link("router", "server 1", latency_s=0.02, bytes_per_s=2e6)
        links.hang_all("server 2")          # a partition; `heal_all` ends it
        links.break_connections("server 3")  # every connection of it is reset, now

Daemons are named as in the swarm. All calls may come from any thread. Bytes of one direction are
delivered in order; what is in the kernel's own buffers is beyond the emulator's reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

READ_BYTES = 256 * 1024
QUEUED_PIECES = 64
IDENTIFY_TRIES = 50


@dataclass(eq=False)
class Link:
    """The way between two daemons, both directions alike.

    Attributes:
        latency_s: one way.
        bytes_per_s: of both directions, each.
        is_hung: nothing flows, and nothing breaks.
        is_refused: new connections are reset at once.
        carried_bytes: so far.
        connections: made so far.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    is_hung: bool = False
    is_refused: bool = False
    carried_bytes: int = 0
    connections: int = 0
    flows: asyncio.Event = field(default_factory=asyncio.Event)
    open: set[_Connection] = field(default_factory=set)


class LinkEmulator:
    """See the module; use as a context manager round the swarm."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._links: dict[frozenset[str], Link] = {}
        self._pids: dict[str, int] = {}
        self._servers: list[asyncio.Server] = []
        self.strangers = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # For `PrivateSwarm`.

    def place(self, name: str) -> tuple[str, str]:
        """Makes a place for a daemon: the address to listen on, and the one to announce."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        outer = self._call(self._listen(name, port))
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
        self._do(lambda: self._set_hung(self._link(one, other), is_hung=True))

    def heal(self, one: str, other: str) -> None:
        """Ends a hang or a refusal."""
        self._do(lambda: self._set_hung(self._link(one, other), is_hung=False))

    def hang_all(self, name: str) -> None:
        """Cuts a daemon off from all others."""
        self._do(lambda: [self._set_hung(link, is_hung=True) for link in self._links_of(name)])

    def heal_all(self, name: str) -> None:
        """Brings a daemon back."""
        self._do(lambda: [self._set_hung(link, is_hung=False) for link in self._links_of(name)])

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

    # On the loop's thread.

    def _do(self, act: Callable[[], object]) -> None:
        async def run() -> None:
            act()

        self._call(run())

    def _call(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def _link(self, one: str, other: str) -> Link:
        pair = frozenset((one, other))
        if pair not in self._links:
            self._links[pair] = Link()
            self._links[pair].flows.set()
        return self._links[pair]

    def _links_of(self, name: str) -> list[Link]:
        return [self._link(name, other) for other in self._pids if other != name]

    def _set_hung(self, link: Link, *, is_hung: bool) -> None:
        link.is_hung, link.is_refused = is_hung, False
        if is_hung:
            link.flows.clear()
        else:
            link.flows.set()

    async def _listen(self, name: str, port: int) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.CancelledError):  # at the end; asyncio would report it
                await self._serve(name, port, reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=READ_BYTES)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def _serve(
        self, name: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        own_port = writer.get_extra_info("peername")[1]
        source = await self._identify(own_port)
        if source is None and _socket_inode(own_port) is None:
            _reset(writer)  # who dialled has given it up already, or was killed
            return
        if source is None:
            self.strangers += 1
            source = "a stranger"
        link = self._link(source, name)
        if link.is_refused:
            _reset(writer)
            return
        await link.flows.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(
                "127.0.0.1", port, limit=READ_BYTES
            )
        except OSError:
            _reset(writer)
            return
        link.connections += 1
        connection = _Connection(link, (reader, writer), (far_reader, far_writer))
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
            await asyncio.sleep(0.01)  # the child may be about to be made known
        return None

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for link in self._links.values():
            for connection in list(link.open):
                connection.reset()
        current = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """One connection between two daemons."""

    def __init__(
        self,
        link: Link,
        near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._link = link
        self._near = near
        self._far = far

    async def run(self) -> None:
        """Carries until both directions have ended, or it broke."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(self._near[0], self._far[1]))
                group.create_task(self._carry(self._far[0], self._near[1]))
        except* (OSError, asyncio.CancelledError):
            self.reset()
        finally:
            for _, writer in (self._near, self._far):
                writer.close()

    def reset(self) -> None:
        """Breaks it at both ends, now."""
        for _, writer in (self._near, self._far):
            _reset(writer)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = self._link
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_PIECES)

        async def deliver() -> None:
            while True:
                arrives_at, data = await pieces.get()
                delay_s = arrives_at - loop.time()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                await link.flows.wait()
                if not data:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                    return
                writer.write(data)
                link.carried_bytes += len(data)
                await writer.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            free_at = loop.time()
            while True:
                data = await reader.read(READ_BYTES)
                free_at = max(free_at, loop.time()) + len(data) / link.bytes_per_s
                await pieces.put((free_at + link.latency_s, data))
                if not data:
                    return


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


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
