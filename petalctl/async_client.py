"""The trio client: many jobs at once on one connection, each with the cancellation of its scope.

There is no task in the background: of the tasks that wait for an answer one reads, for all. So
nothing is read that nobody waits for, and the daemon feels it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import trio

from p2p.wire.control_messages import (
    ChainHop,
    CloseSession,
    Generated,
    GenerateDone,
    Pause,
    Paused,
    Progress,
    Resume,
    Resumed,
    SessionClosed,
    StatusReport,
    StatusRequest,
    SwarmReport,
    SwarmRequest,
)
from p2p.wire.message import M, expect
from petalctl.client import (
    CONNECT_TIMEOUT_S,
    RECEIVE_BYTES,
    OnProgress,
    find_socket,
    tried_sockets,
)
from petalctl.connection import Answer, ControlConnection, Request, explain_connect_failure
from petalctl.errors import CommandError
from petalctl.generation_state import Event, GenerationState
from petalctl.requests import GenerateOptions, make_generate

SEND_DEADLINE_S = 10.0
"""A frame is sent whole, whatever is cancelled meanwhile; a daemon slower than this hangs."""


class AsyncClient:
    """A connection to the daemon of this machine, for trio; use as an async context manager.

    Args:
        socket_path: of the daemon; found by `default_socket_path` when it is not given.

    Cancellation: a job whose scope is cancelled is cancelled in the daemon; the others go on.
    """

    def __init__(self, socket_path: str | Path | None = None) -> None:
        self._socket_path = socket_path
        self._connection = ControlConnection()
        self._stream: trio.SocketStream | None = None
        self._send_lock = trio.Lock()
        self._is_reading = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> Self:
        """Connects.

        Raises:
            DaemonUnreachable: no daemon answers there; the text says what to do.
        """
        path = find_socket(self._socket_path)
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                await sock.connect(os.fspath(path))
        except (OSError, trio.TooSlowError) as error:
            sock.close()
            cause = TimeoutError() if isinstance(error, trio.TooSlowError) else error
            raise explain_connect_failure(path, cause, tried_sockets(self._socket_path)) from error
        except BaseException:
            sock.close()
            raise
        self._stream = trio.SocketStream(sock)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connection, and with it every job on it."""
        self._connection.receive_data(b"")
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)

    async def status(self) -> StatusReport:
        """What the daemon is and does.

        Raises:
            JobError, DaemonUnreachable: there was no answer.
        """
        return await self._ask(StatusRequest(job=0), StatusReport)

    async def swarm(self, model: str = "") -> SwarmReport:
        """Which servers hold what, of one model or of all that the daemon knows.

        Raises:
            JobError, DaemonUnreachable: there was no answer.
        """
        return await self._ask(SwarmRequest(job=0, model=model), SwarmReport)

    async def close_session(self, session: str) -> None:
        """Gives up a session that was kept by `generate`.

        Raises:
            JobError, DaemonUnreachable: there was no answer.
        """
        await self._ask(CloseSession(job=0, session=session), SessionClosed)

    async def pause(self, for_s: float | None = None, *, within_s: float | None = None) -> Paused:
        """Has this daemon's server make way: its sessions move to others, and it takes no new ones.

        Args:
            for_s: how long; none until `resume`.
            within_s: how long the sessions have to move before they are ended; none lets the
                daemon's configuration say.

        Raises:
            JobError: the daemon serves nothing, or a value is out of bounds.
            DaemonUnreachable: there was no answer.
        """
        request = Pause(job=0, for_s=for_s, within_s=within_s)
        return await self._ask(request, Paused)

    async def resume(self) -> Resumed:
        """Ends the pause; says whether the server is back.

        Raises:
            JobError: the daemon serves nothing.
            DaemonUnreachable: there was no answer.
        """
        return await self._ask(Resume(job=0), Resumed)

    @asynccontextmanager
    async def generate(
        self,
        prompt: str | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[AsyncGeneration]:
        """Continues a prompt while the block lasts; leaving it ends the job where it still runs.

        Args:
            prompt: text, taken as it is; or give ``turns`` or ``prompt_tokens``.
            on_progress: called, while the answer is read, with what happens to the job.
            options: see `GenerateOptions`.

        Raises:
            JobError: the request cannot be sent.
            DaemonUnreachable: the connection is gone.
        """
        request = make_generate(prompt, options)
        while self._connection.is_winding_up(request.session):
            await self._receive()
        job = await self._begin(request)
        generation = AsyncGeneration(self, job, on_progress)
        try:
            yield generation
        finally:
            generation._state.close()
            await self._abandon(job)

    async def _ask(self, request: Request, kind: type[M]) -> M:
        job = await self._begin(request)
        try:
            return expect(await self._next_answer(job), kind)
        finally:
            await self._abandon(job)

    async def _begin(self, request: Request) -> int:
        job, frame = self._connection.begin(request)
        try:
            await self._send(frame)
        except BaseException:
            await self._abandon(job)
            raise
        return job

    async def _abandon(self, job: int) -> None:
        if data := self._connection.abandon(job):
            with trio.CancelScope(shield=True):
                await self._send(data)

    async def _send(self, data: bytes) -> None:
        async with self._send_lock:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + SEND_DEADLINE_S) as s:
                try:
                    await self._open_stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return  # what the daemon said before it closed the connection is still read
        if s.cancelled_caught:
            await self.aclose()

    async def _next_answer(self, job: int) -> Answer:
        while (answer := self._connection.next_answer(job)) is None:
            await self._receive()
        return answer

    async def _receive(self) -> None:
        """Waits until something arrived: by reading, or until another task has read."""
        if self._is_reading:
            await self._waiting.park()
            return
        self._is_reading = True
        try:
            data = bytes(await self._open_stream.receive_some(RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        finally:
            self._is_reading = False
            self._waiting.unpark_all()
        self._connection.receive_data(data)

    @property
    def _open_stream(self) -> trio.SocketStream:
        if self._stream is None:
            raise RuntimeError("an AsyncClient is used inside its `async with` block")
        return self._stream


class AsyncGeneration:
    """An answer in the making; made by `AsyncClient.generate`.

    Iterate over it for the pieces of text, or over `events` for everything that is told, or ask for
    the `result`.
    """

    def __init__(self, client: AsyncClient, job: int, on_progress: OnProgress | None) -> None:
        self._client = client
        self._job = job
        self._on_progress = on_progress
        self._state = GenerationState()

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._state.text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the new tokens so far."""
        return tuple(self._state.tokens)

    @property
    def chain(self) -> tuple[ChainHop, ...]:
        """The hops that it crosses, as far as they are known."""
        return self._state.chain

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """The next piece of text.

        Raises:
            JobError, DaemonUnreachable: the job did not end well; `text` has what came before.
        """
        while self._state.done is None:
            event = await self._next_event()
            if isinstance(event, Generated) and event.text:
                return event.text
        raise StopAsyncIteration

    def events(self) -> AsyncEvents:
        """Everything that the daemon tells of the job, as it comes; `GenerateDone` is the last.

        Raises:
            JobError, DaemonUnreachable: while it is iterated over; the job did not end well.
        """
        return AsyncEvents(self)

    async def result(self) -> GenerateDone:
        """The whole answer; waits for its end.

        Raises:
            JobError, DaemonUnreachable: the job did not end well.
        """
        while self._state.done is None:
            await self._next_event()
        return self._state.done

    async def _next_event(self) -> Event:
        if self._state.failure is not None:
            raise self._state.failure
        try:
            event = self._state.take(await self._client._next_answer(self._job))
        except CommandError as error:
            self._state.failure = error
            raise
        if isinstance(event, Progress) and self._on_progress is not None:
            self._on_progress(event)
        return event


class AsyncEvents:
    """The events of a generation; made by `AsyncGeneration.events`.

    Not an async generator: leaving a loop over one of those leaves it to the garbage collector.
    """

    def __init__(self, generation: AsyncGeneration) -> None:
        self._generation = generation

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._generation._state.done is not None:
            raise StopAsyncIteration
        return await self._generation._next_event()
