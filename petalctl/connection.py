"""One connection to the daemon, without a socket: job numbers, what is sent, whose answers came.

Both clients feed it with what arrived and send what it gives. Invariant: an answer is handed to the
job that it belongs to, in order; the answers of an abandoned job are dropped until its last one.
"""

from __future__ import annotations

import dataclasses
import stat
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.wire.control_messages import (
    MAX_CONTROL_FRAME_BYTES,
    Cancel,
    CloseSession,
    Generate,
    Generated,
    GenerateDone,
    JobFailed,
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
from p2p.wire.frame import HEADER_BYTES, FrameParser
from p2p.wire.message import Message, decode_message, encode_message
from p2p.wire.tensor import WireTensor
from p2p.wire.training_messages import (
    AdapterGradient,
    AdapterKept,
    BackwardBatch,
    BackwardDone,
    BatchRows,
    ForgetForward,
    ForwardBatch,
    ForwardDone,
    ForwardForgotten,
    HiddenOpened,
    HiddenStepDone,
    OpenHiddenSession,
    PutAdapter,
    RunHiddenStep,
)
from petalctl.errors import CommandError, ConnectionLost, DaemonUnreachable, JobError

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
    | ForgetForward
    | OpenHiddenSession
    | RunHiddenStep
)
Answer = (
    StatusReport
    | SwarmReport
    | Progress
    | Generated
    | GenerateDone
    | SessionClosed
    | Paused
    | Resumed
    | AdapterKept
    | BatchRows
    | AdapterGradient
    | ForwardDone
    | BackwardDone
    | ForwardForgotten
    | HiddenOpened
    | HiddenStepDone
)

_PIECES: dict[type[Message], tuple[type[Message], ...]] = {
    Generate: (Progress, Generated),
    ForwardBatch: (Progress, BatchRows),
    BackwardBatch: (Progress, BatchRows, AdapterGradient),
}
_RESULTS: dict[type[Message], type[Message]] = {
    StatusRequest: StatusReport,
    SwarmRequest: SwarmReport,
    Generate: GenerateDone,
    CloseSession: SessionClosed,
    Pause: Paused,
    Resume: Resumed,
    PutAdapter: AdapterKept,
    ForwardBatch: ForwardDone,
    BackwardBatch: BackwardDone,
    ForgetForward: ForwardForgotten,
    OpenHiddenSession: HiddenOpened,
    RunHiddenStep: HiddenStepDone,
}


@dataclass(slots=True)
class _Job:
    kind: type[Message]
    session: str
    answers: deque[Answer | JobFailed] = field(default_factory=deque)
    has_ended: bool = False
    is_abandoned: bool = False


class ControlConnection:
    """The app's side of one connection."""

    def __init__(self) -> None:
        self._parser = FrameParser(max_frame_bytes=MAX_CONTROL_FRAME_BYTES)
        self._jobs: dict[int, _Job] = {}
        self._last_job = 0
        self._failure: CommandError | None = None

    def begin(self, request: Request) -> tuple[int, bytes]:
        """Gives the request a job number; returns it, and what is to be sent.

        Raises:
            JobError: the request cannot be sent; a value is out of bounds, or it is too large.
            CommandError: the connection is of no more use.
        """
        if self._failure is not None:
            raise self._failure
        job = self._last_job + 1
        frame = _encode_request(dataclasses.replace(request, job=job))
        self._last_job = job
        session = request.session if isinstance(request, Generate) else ""
        self._jobs[job] = _Job(type(request), session)
        return job, frame

    def rows_frame(self, job: int, row: int, hidden: WireTensor) -> bytes:
        """What is to be sent so that a job gets rows of its batch; nothing where it has ended.

        Raises:
            JobError: the rows cannot be sent.
        """
        known = self._jobs.get(job)
        if known is None or known.has_ended or self._failure is not None:
            return b""
        try:
            return encode_message(
                BatchRows(job=job, row=row, hidden=hidden), max_frame_bytes=MAX_CONTROL_FRAME_BYTES
            )
        except LocalProtocolError as error:
            raise JobError("message_too_large", f"the rows cannot be sent: {error}") from error

    def cancel(self, job: int) -> bytes:
        """What is to be sent so that the job ends early; its answers go on to its last one."""
        known = self._jobs.get(job)
        if known is None or known.has_ended or self._failure is not None:
            return b""
        return encode_message(Cancel(job=job))

    def abandon(self, job: int) -> bytes:
        """As `cancel`, and nobody will ask for the answers."""
        data = self.cancel(job)
        known = self._jobs.get(job)
        if known is not None:
            known.is_abandoned = True
            known.answers.clear()
            if known.has_ended:
                del self._jobs[job]
        return data

    def is_winding_up(self, session: str) -> bool:
        """Whether an abandoned job still holds this kept session."""
        return (
            bool(session)
            and self._failure is None
            and any(job.is_abandoned and job.session == session for job in self._jobs.values())
        )

    def receive_data(self, data: bytes) -> None:
        """Takes what arrived; no bytes are the end of the connection.

        After a failure the jobs still give what came before it, and then the failure.
        """
        if self._failure is not None:
            return
        if not data:
            self._failure = ConnectionLost(
                "the daemon closed the connection before the job ended; look into its log, and "
                "whether it still runs"
            )
            return
        try:
            for body in self._parser.feed(data):
                self._take(decode_message(body))
        except RemoteProtocolError as error:
            self._failure = DaemonUnreachable(
                f"the daemon's answer cannot be read: {error}; are petald and petalctl of one "
                "version?",
                code=error.code,
            )

    def next_answer(self, job: int) -> Answer | None:
        """The job's next answer; none where nothing more of it has arrived.

        Raises:
            JobError: the job ended without its result.
            CommandError: the connection failed.
        """
        known = self._jobs[job]
        if not known.answers:
            if self._failure is not None:
                raise self._failure
            return None
        answer = known.answers.popleft()
        if known.has_ended and not known.answers:
            del self._jobs[job]
        if isinstance(answer, JobFailed):
            raise JobError(answer.code, answer.text)
        return answer

    def _take(self, message: Message) -> None:
        if isinstance(message, JobFailed) and message.job == 0:
            self._failure = JobError(message.code, message.text)
            return
        number = getattr(message, "job", None)
        job = self._jobs.get(number) if isinstance(number, int) else None
        if job is None or job.has_ended:
            raise RemoteProtocolError(f"a message {message.MESSAGE_NAME!r} came for no job of ours")
        is_result = isinstance(message, (_RESULTS[job.kind], JobFailed))
        if not is_result and not isinstance(message, _PIECES.get(job.kind, ())):
            raise RemoteProtocolError(
                f"a message {message.MESSAGE_NAME!r} came in answer to {job.kind.MESSAGE_NAME!r}"
            )
        job.has_ended = is_result
        if not job.is_abandoned:
            job.answers.append(message)  # type: ignore[arg-type]  # one of the classes just checked
        elif is_result and isinstance(number, int):
            del self._jobs[number]


def _encode_request(request: Request) -> bytes:
    """The request's frame, read back once: what the daemon would refuse is an error here.

    Otherwise it would take the whole connection for broken, with all the jobs on it.
    """
    try:
        frame = encode_message(request, max_frame_bytes=MAX_CONTROL_FRAME_BYTES)
        decode_message(frame[HEADER_BYTES:])
    except LocalProtocolError as error:
        raise JobError("message_too_large", f"the request cannot be sent: {error}") from error
    except UnicodeEncodeError as error:
        raise JobError("bad_request", "a text is not valid UTF-8; convert it first") from error
    except (RemoteProtocolError, OverflowError, TypeError) as error:
        raise JobError("bad_request", f"the request cannot be sent: {error}") from error
    return frame


def explain_connect_failure(
    path: Path, error: Exception, tried: tuple[Path, ...] = ()
) -> DaemonUnreachable:
    """Why no daemon could be reached at the path, and what to do.

    Args:
        path: that was tried.
        error: what came of it.
        tried: where else was looked.
    """
    advice = (
        "Start a daemon with `petald --config petald.toml` or `petalctl service install`; name the "
        "socket of one that runs with --socket or PETALD_SOCKET"
    )
    if isinstance(error, PermissionError):
        return DaemonUnreachable(
            f"no permission to use the socket {path}: run this as the daemon's user, or as a "
            "member of the group that its socket_mode lets in"
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        others = [str(other) for other in tried if other != path]
        also = f" (nor at {' or '.join(others)})" if others else ""
        return DaemonUnreachable(f"there is no petald socket at {path}{also}. {advice}.")
    if isinstance(error, ConnectionRefusedError):
        if not _is_socket(path):
            return DaemonUnreachable(f"{path} is not a socket. {advice}.")
        return DaemonUnreachable(
            f"the socket {path} is left over from a petald that no longer runs. {advice}."
        )
    if isinstance(error, TimeoutError | BlockingIOError):
        return DaemonUnreachable(
            f"the petald at {path} does not take connections; it is overloaded or hangs"
        )
    return DaemonUnreachable(f"cannot reach a petald at {path}: {error}. {advice}.")


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return True
