"""The Unix socket: jobs from the apps of this machine.

One task for each connection reads requests and starts a task for each job; the connection's end
cancels them. A connection's kept sessions live in its nursery and go with it. Access is by the
socket's file mode; who connects is looked up for the log. Invariant: whatever a connection sends,
only that connection is closed for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from kernels.errors import KernelError
from p2p.errors import P2PError, RemoteProtocolError, StreamBroken
from p2p.rpc import MessageStream
from p2p.wire.control_messages import (
    MAX_CONTROL_FRAME_BYTES,
    Cancel,
    CloseSession,
    Generate,
    JobFailed,
    Pause,
    Resume,
    SessionClosed,
    StatusRequest,
    SwarmRequest,
)
from p2p.wire.message import Message
from p2p.wire.training_messages import (
    BackwardBatch,
    BatchRows,
    ForgetForward,
    ForwardBatch,
    ForwardForgotten,
    OpenHiddenSession,
    PutAdapter,
    RunHiddenStep,
)
from petald.config import DaemonConfig
from petald.errors import BadRequest, PetaldError, SocketInUse, raise_alone
from petald.generation import GenerationJob, KeptSession
from petald.hidden_sessions import HiddenSessions, HiddenState
from petald.log import get_logger, log_context
from petald.training_jobs import TrainingJobs, TrainingState

log = get_logger(__name__)

MAX_CONNECTIONS = 256
MAX_JOBS = 64
MAX_KEPT_SESSIONS = 16
SEND_DEADLINE_S = 60.0
"""For an app that does not read: its job ends, rather than hold caches on other machines."""

CODE_CANCELLED = "cancelled"

TRAINING = (PutAdapter, ForwardBatch, BackwardBatch)
HIDDEN = (OpenHiddenSession, RunHiddenStep)
LENDING = (Pause, Resume)
Request = (
    StatusRequest
    | SwarmRequest
    | Generate
    | CloseSession
    | Pause
    | Resume
    | PutAdapter
    | ForwardBatch
    | BackwardBatch
    | OpenHiddenSession
    | RunHiddenStep
)
REQUESTS = (StatusRequest, SwarmRequest, Generate, CloseSession, *LENDING, *TRAINING, *HIDDEN)

Send = Callable[[Message], Awaitable[None]]


class Jobs:
    """What the control socket can be asked to do; made by the daemon.

    Attributes are the daemon's parts: coroutines that report, and that pause and resume, and a
    maker of generations.
    """

    def __init__(
        self,
        *,
        report_status: Callable[[int], Awaitable[Message]],
        report_swarm: Callable[[SwarmRequest], Awaitable[Message]],
        make_generation: Callable[[Generate, Send], Awaitable[GenerationJob]],
        pause_or_resume: Callable[[Pause | Resume], Awaitable[Message]],
        training: TrainingJobs,
        hidden: HiddenSessions,
    ) -> None:
        self.report_status = report_status
        self.report_swarm = report_swarm
        self.make_generation = make_generation
        self.pause_or_resume = pause_or_resume
        self.training = training
        self.hidden = hidden
        self.running = 0


class _SocketStream:
    """A trio socket stream, as `p2p.network.Stream`."""

    def __init__(self, stream: trio.SocketStream, remote: str) -> None:
        self._stream = stream
        self._remote = remote

    @property
    def remote_peer(self) -> str:
        return self._remote

    @property
    def remote_host(self) -> str:
        """Empty: this machine."""
        return ""

    async def send_all(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamBroken("the app closed its connection") from error

    async def receive_some(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some())
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamBroken("the app closed its connection") from error

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def abort(self) -> None:
        await trio.aclose_forcefully(self._stream)


@dataclass(eq=False, slots=True)
class _Connection:
    """One app's connection."""

    messages: MessageStream
    nursery: trio.Nursery
    training: TrainingState
    jobs: dict[int, trio.CancelScope] = field(default_factory=dict)
    kept: dict[str, KeptSession] = field(default_factory=dict)
    sessions_in_use: set[str] = field(default_factory=set)
    hidden: HiddenState = field(default_factory=HiddenState)

    async def send(self, message: Message) -> None:
        """Sends to the app; raises `StreamBroken` when it does not read.

        Cancellation: the message is sent whole, or not at all, for others follow it.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.move_on_after(SEND_DEADLINE_S, shield=True) as waiting:
            await self.messages.send(message)
        if waiting.cancelled_caught:
            self.nursery.cancel_scope.cancel()
            raise StreamBroken("the app does not read its answers")


async def serve_control(
    listener: trio.SocketListener,
    jobs: Jobs,
) -> None:
    """Serves apps until it is cancelled."""
    limiter = trio.CapacityLimiter(MAX_CONNECTIONS)
    async with trio.open_nursery() as nursery:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:  # out of file descriptors, say
                log.warning("control socket cannot accept", reason=str(error))
                await trio.sleep(0.1)
                continue
            if limiter.available_tokens < 1:
                await trio.aclose_forcefully(stream)
                continue
            limiter.acquire_on_behalf_of_nowait(stream)
            nursery.start_soon(_serve_connection, stream, jobs, limiter)


async def _serve_connection(
    stream: trio.SocketStream, jobs: Jobs, limiter: trio.CapacityLimiter
) -> None:
    remote = _describe_app(stream)
    try:
        with log_context(app=remote):
            async with MessageStream(
                _SocketStream(stream, remote), max_frame_bytes=MAX_CONTROL_FRAME_BYTES
            ) as messages:
                await _run_connection(messages, jobs)
    except Exception:  # the inbound handler: a bug here ends this connection, not the daemon
        log.exception("connection failed")
    finally:
        limiter.release_on_behalf_of(stream)
        await trio.aclose_forcefully(stream)


async def _run_connection(messages: MessageStream, jobs: Jobs) -> None:
    training = TrainingState()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_break_when_cancelled, messages)
            connection = _Connection(messages, nursery, training)
            await _read_requests(connection, jobs)
            nursery.cancel_scope.cancel()
    finally:
        training.close()


async def _read_requests(connection: _Connection, jobs: Jobs) -> None:
    try:
        while (request := await connection.messages.receive()) is not None:
            await _take_request(connection, request, jobs)
    except RemoteProtocolError as error:
        log.info("app sent what is no request", code=error.code, reason=str(error))
        with contextlib.suppress(StreamBroken):
            await connection.send(JobFailed(job=0, code=error.code, text=str(error)))
    except StreamBroken:
        pass


async def _tell(connection: _Connection, message: Message) -> None:
    with contextlib.suppress(StreamBroken):
        await connection.send(message)


async def _break_when_cancelled(messages: MessageStream) -> None:
    """Breaks the socket with the connection's end, so that nothing is being sent for longer."""
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await messages.abort()


async def _take_request(connection: _Connection, request: Message, jobs: Jobs) -> None:
    if isinstance(request, Cancel):
        scope = connection.jobs.get(request.job)
        if scope is not None:
            scope.cancel()
        return
    if isinstance(request, BatchRows):
        connection.training.take_rows(request)
        return
    if isinstance(request, ForgetForward):  # at once, however many jobs there are
        connection.training.forget(request.forward)
        done = ForwardForgotten(job=request.job)
        connection.nursery.start_soon(_tell, connection, done)
        return
    if not isinstance(request, REQUESTS):
        raise RemoteProtocolError(f"{request.MESSAGE_NAME!r} is no request")
    if request.job in connection.jobs:
        raise RemoteProtocolError(f"job {request.job} runs already on this connection")
    if len(connection.jobs) >= MAX_JOBS:
        text = f"this connection has {MAX_JOBS} jobs already; wait for one to end"
        await connection.send(JobFailed(job=request.job, code="overloaded", text=text))
        return
    if isinstance(request, ForwardBatch | BackwardBatch):  # whose rows come next
        jobs.training.expect(request, connection.training)
    scope = connection.jobs[request.job] = trio.CancelScope()
    connection.nursery.start_soon(_run_job, connection, request, scope, jobs)


async def _run_job(
    connection: _Connection,
    request: Request,
    scope: trio.CancelScope,
    jobs: Jobs,
) -> None:
    jobs.running += 1
    failure: JobFailed | None = None
    try:
        with scope:
            try:
                await _do_job(connection, request, jobs)
            except (PetaldError, KernelError, P2PError) as error:
                failure = JobFailed(job=request.job, code=error.code, text=str(error)[:4096])
        if scope.cancelled_caught:
            failure = JobFailed(job=request.job, code=CODE_CANCELLED, text="the job was cancelled")
    finally:
        jobs.running -= 1
        del connection.jobs[request.job]
    if failure is not None:
        log.debug("job failed", code=failure.code, reason=failure.text)
        with contextlib.suppress(StreamBroken):
            await connection.send(failure)


async def _do_job(
    connection: _Connection,
    request: Request,
    jobs: Jobs,
) -> None:
    if isinstance(request, StatusRequest):
        await connection.send(await jobs.report_status(request.job))
    elif isinstance(request, SwarmRequest):
        await connection.send(await jobs.report_swarm(request))
    elif isinstance(request, Generate):
        await _generate(connection, request, jobs)
    elif isinstance(request, LENDING):
        await connection.send(await jobs.pause_or_resume(request))
    elif isinstance(request, TRAINING):
        await jobs.training.run(request, connection.training, connection.send)
    elif isinstance(request, HIDDEN):
        await jobs.hidden.run(
            request,
            connection.hidden,
            connection.send,
            nursery=connection.nursery,
            adapters=connection.training.adapters,
        )
    else:
        kept = connection.kept.pop(request.session, None)
        if kept is not None:
            await kept.session.close()
        await connection.hidden.close(request.session)
        await connection.send(SessionClosed(job=request.job))


async def _generate(connection: _Connection, request: Generate, jobs: Jobs) -> None:
    name = request.session
    job = await jobs.make_generation(request, connection.send)
    if name in connection.sessions_in_use:
        raise BadRequest(f"the session {name!r} has a job running already; wait for its end")
    if name and name not in connection.kept and len(connection.kept) >= MAX_KEPT_SESSIONS:
        raise BadRequest(f"this connection keeps {MAX_KEPT_SESSIONS} sessions; close one first")
    if name:
        connection.sessions_in_use.add(name)
    is_in_use = bool(name)
    kept: KeptSession | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.tell_news)
            kept = await job.open_session(connection.nursery, connection.kept.pop(name, None))
            if name:
                connection.kept[name] = kept
            done = await job.run(kept)
            if is_in_use:  # an app that hears of the end may use the session again at once
                connection.sessions_in_use.discard(name)
                is_in_use = False
            await connection.send(done)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise_alone(group)
    finally:
        if is_in_use:
            connection.sessions_in_use.discard(name)
        if kept is not None and not (name and kept.session.is_open):
            if connection.kept.get(name) is kept:
                del connection.kept[name]
            await kept.session.close()


@asynccontextmanager
async def open_control_socket(config: DaemonConfig) -> AsyncIterator[trio.SocketListener]:
    """Listens on the configured path; removes the file with the block's end.

    Raises:
        SocketInUse: another daemon serves there, or something else is at the path.
    """
    path = config.socket
    await _make_way(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            # The file is made with no more rights than it will have.
            old_umask = os.umask(0o177)
            try:
                await sock.bind(str(path))
            finally:
                os.umask(old_umask)
        except OSError as error:
            raise SocketInUse(
                f"cannot listen on {path}: {error.strerror or error}; "
                "set [daemon] socket to another path"
            ) from error
        path.chmod(int(config.socket_mode, 8))
        identity = _identify(path)
        sock.listen(64)
        try:
            yield trio.SocketListener(sock)
        finally:
            with contextlib.suppress(OSError):
                if _identify(path) == identity:
                    path.unlink()
    finally:
        sock.close()


def _identify(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


async def _make_way(path: Path) -> None:
    """Removes the socket that a dead daemon left; leaves everything else alone."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISSOCK(mode):
        raise SocketInUse(f"{path} exists and is no socket; set [daemon] socket to another path")
    probe = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await probe.connect(str(path))
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            path.unlink(missing_ok=True)
            return
        raise SocketInUse(f"cannot look whether {path} is in use: {error.strerror}") from error
    finally:
        probe.close()
    raise SocketInUse(
        f"another petald serves {path} already; stop it, or set [daemon] socket to another path"
    )


def _describe_app(stream: trio.SocketStream) -> str:
    """Who connected, as the kernel knows it."""
    try:
        raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return "unknown"
    pid, uid, _ = struct.unpack("3i", raw)
    return f"pid {pid} of uid {uid}"
