"""The blocking client: the daemon's jobs for plain Python programs, on one thread at a time.

It imports neither trio, torch nor libp2p. `petalctl.async_client` is the same for trio.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from p2p.errors import P2PError
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
from p2p.wire.socket_path import candidate_socket_paths, check_socket_path, default_socket_path
from petalctl.connection import Answer, ControlConnection, Request, explain_connect_failure
from petalctl.errors import CommandError, DaemonUnreachable, JobError
from petalctl.generation_state import Event, GenerationState
from petalctl.requests import GenerateOptions, make_generate

CONNECT_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = 5.0
MOVE_TIMEOUT_S = 86400.0
"""For sessions to move: the most that a daemon's configuration can say."""
"""How long a cancelled job may take to end before its session is given up."""

RECEIVE_BYTES = 65536

OnProgress = Callable[[Progress], None]


class Client:
    """A connection to the daemon of this machine.

    Several jobs may be open at once; their answers are told apart. Closing the client cancels them
    all, and frees what they hold on every peer.

    Args:
        socket_path: of the daemon; found by `default_socket_path` when it is not given.
        answer_timeout_s: how long a report may take. A generation may take as long as it likes.

    Raises:
        DaemonUnreachable: no daemon answers there; the text says what to do.
    """

    def __init__(
        self, socket_path: str | Path | None = None, *, answer_timeout_s: float = 60.0
    ) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._connection = ControlConnection()
        self._receive_bytes = RECEIVE_BYTES
        self._socket = _connect(socket_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it every job on it."""
        self._socket.close()
        self._connection.receive_data(b"")

    def status(self) -> StatusReport:
        """What the daemon is and does.

        Raises:
            JobError, DaemonUnreachable: there was no answer.
        """
        return self._ask(StatusRequest(job=0), StatusReport)

    def swarm(self, model: str = "") -> SwarmReport:
        """Which servers hold what, of one model or of all that the daemon knows.

        Raises:
            JobError, DaemonUnreachable: there was no answer.
        """
        return self._ask(SwarmRequest(job=0, model=model), SwarmReport)

    def generate(
        self,
        prompt: str | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Begins to continue a prompt. The answer streams from what this returns.

        Args:
            prompt: text, taken as it is; or give ``turns`` or ``prompt_tokens``.
            on_progress: called, while the answer is read, with what happens to the job.
            options: see `GenerateOptions`.

        Raises:
            JobError: the request cannot be sent.
            DaemonUnreachable: the connection is gone.
        """
        request = make_generate(prompt, options)
        deadline = time.monotonic() + CANCEL_TIMEOUT_S
        while self._connection.is_winding_up(request.session):
            self._receive(deadline)
        return Generation(self, self._begin(request), on_progress)

    def close_session(self, session: str) -> None:
        """Gives up a session that was kept by `generate`.

        Raises:
            JobError, DaemonUnreachable: there was no answer.
        """
        self._ask(CloseSession(job=0, session=session), SessionClosed)

    def pause(self, for_s: float | None = None, *, within_s: float | None = None) -> Paused:
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
        return self._ask(request, Paused, more_s=MOVE_TIMEOUT_S if within_s is None else within_s)

    def resume(self) -> Resumed:
        """Ends the pause; says whether the server is back.

        Raises:
            JobError: the daemon serves nothing.
            DaemonUnreachable: there was no answer.
        """
        return self._ask(Resume(job=0), Resumed)

    def _ask(self, request: Request, kind: type[M], *, more_s: float = 0.0) -> M:
        job = self._begin(request)
        deadline = time.monotonic() + self._answer_timeout_s + more_s
        try:
            return expect(self._next_answer(job, deadline), kind)
        finally:
            self._send(self._connection.abandon(job))

    def _begin(self, request: Request) -> int:
        job, frame = self._connection.begin(request)
        self._send(frame)
        return job

    def _send(self, data: bytes) -> None:
        if not data:
            return
        try:
            self._socket.settimeout(None)
            self._socket.sendall(data)
        except OSError:
            self._receive_rest()

    def _next_answer(self, job: int, deadline: float | None = None) -> Answer:
        while (answer := self._connection.next_answer(job)) is None:
            self._receive(deadline)
        return answer

    def _receive(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
        else:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._socket.recv(self._receive_bytes)
        except TimeoutError as error:
            raise JobError(
                "deadline_exceeded", "the daemon did not answer in time; look into its log"
            ) from error
        except OSError:
            data = b""
        self._connection.receive_data(data)

    def _receive_rest(self) -> None:
        """Takes what the daemon said before it closed the connection: it may say why."""
        self._socket.settimeout(1.0)
        try:
            while data := self._socket.recv(RECEIVE_BYTES):
                self._connection.receive_data(data)
        except OSError:
            pass
        self._connection.receive_data(b"")


class Generation:
    """An answer in the making; made by `Client.generate`.

    Iterate over it for the pieces of text, or over `events` for everything that is told, or ask for
    the `result`. Leaving its ``with`` block, or `close`, ends the job where it still runs.
    """

    def __init__(self, client: Client, job: int, on_progress: OnProgress | None) -> None:
        self._client = client
        self._job = job
        self._on_progress = on_progress
        self._state = GenerationState()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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

    def __iter__(self) -> Iterator[str]:
        """The pieces of text, as they come.

        Raises:
            JobError, DaemonUnreachable: the job did not end well; `text` has what came before.
        """
        for event in self.events():
            if isinstance(event, Generated) and event.text:
                yield event.text

    def events(self) -> Iterator[Event]:
        """Everything that the daemon tells of the job, as it comes; `GenerateDone` is the last.

        Raises:
            JobError, DaemonUnreachable: the job did not end well.
        """
        while self._state.done is None:
            yield self._next_event()

    def result(self) -> GenerateDone:
        """The whole answer; waits for its end.

        Raises:
            JobError, DaemonUnreachable: the job did not end well.
        """
        while self._state.done is None:
            self._next_event()
        return self._state.done

    def stop(self) -> None:
        """Asks the daemon to end the job, and does not wait.

        The stream goes on until the daemon has done so, and ends with a `JobError` of the code
        ``cancelled``. May be called from a signal handler while the answer is read.
        """
        self._client._send(self._client._connection.cancel(self._job))

    def close(self) -> None:
        """Ends the job where it still runs; its answers are read no more."""
        if self._state.is_running:
            self._state.close()
            self._client._send(self._client._connection.abandon(self._job))

    def _next_event(self) -> Event:
        if self._state.failure is not None:
            raise self._state.failure
        try:
            event = self._state.take(self._client._next_answer(self._job))
        except CommandError as error:
            self._state.failure = error
            raise
        if isinstance(event, Progress) and self._on_progress is not None:
            self._on_progress(event)
        return event


def find_socket(socket_path: str | Path | None) -> Path:
    """The path to connect to.

    Raises:
        DaemonUnreachable: no socket can lie there.
    """
    try:
        chosen = default_socket_path(os.environ) if socket_path is None else Path(socket_path)
        return check_socket_path(chosen)
    except P2PError as error:
        raise DaemonUnreachable(str(error), code=error.code) from error


def tried_sockets(socket_path: str | Path | None) -> tuple[Path, ...]:
    """Where was looked for a socket, for the text of an error."""
    return candidate_socket_paths(os.environ) if socket_path is None else ()


def _connect(socket_path: str | Path | None) -> socket.socket:
    path = find_socket(socket_path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_TIMEOUT_S)
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        raise explain_connect_failure(path, error, tried_sockets(socket_path)) from error
    return sock
