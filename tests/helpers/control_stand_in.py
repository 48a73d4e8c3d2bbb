"""A daemon for the tests of its clients: real Unix socket, scripted answers, no torch, no libp2p.

A script is a function that is called in a thread for each connection, with the `Conversation`. What
the script raises is kept, and raised again when the stand-in is left.
"""

from __future__ import annotations

import contextlib
import select
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from p2p.wire.control_messages import (
    MAX_CONTROL_FRAME_BYTES,
    Cancel,
    ChainHop,
    CloseSession,
    CodecCount,
    Generate,
    Generated,
    GenerateDone,
    JobFailed,
    ModelSwarm,
    Pause,
    Paused,
    PeerStatus,
    Progress,
    Resume,
    Resumed,
    ServerStatus,
    SessionClosed,
    SpanStatus,
    StatusReport,
    StatusRequest,
    SwarmReport,
    SwarmRequest,
    Timings,
)
from p2p.wire.frame import FrameParser
from p2p.wire.message import Message, decode_message, encode_message

MODEL = "tiny"
CHAIN = (
    ChainHop(peer="12D3KooWPeerNumberOneAAAAAA", start=0, end=2),
    ChainHop(peer="12D3KooWPeerNumberTwoBBBBBB", start=2, end=4),
)


class Conversation:
    """The daemon's side of one connection."""

    def __init__(self, sock: socket.socket, received: list[Message]) -> None:
        self._socket = sock
        self._parser = FrameParser(max_frame_bytes=MAX_CONTROL_FRAME_BYTES)
        self._messages: deque[Message] = deque()
        self._received = received
        self.has_ended = False
        """Whether a poll found that the app has gone."""

    def receive(self) -> Message | None:
        """The next request; none when the app has gone."""
        while not self._messages:
            try:
                data = self._socket.recv(65536)
            except OSError:
                return None
            if not data:
                return None
            self._messages += [decode_message(body) for body in self._parser.feed(data)]
        message = self._messages.popleft()
        self._received.append(message)
        return message

    def poll(self, wait_s: float = 0.0) -> Message | None:
        """A request that comes within the time; none where none does."""
        if not self._messages:
            with contextlib.suppress(OSError):
                if select.select([self._socket], [], [], wait_s)[0]:
                    data = self._socket.recv(65536)
                    self.has_ended = not data
                    self._messages += [decode_message(body) for body in self._parser.feed(data)]
        return self.receive() if self._messages else None

    def send(self, *messages: Message) -> None:
        self.send_bytes(b"".join(map(encode_message, messages)))

    def send_bytes(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def hang_up(self) -> None:
        """Ends the connection under a script that may be using it; from another thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """From the script's own thread: another's close would take the socket from under it."""
        self.hang_up()
        self._socket.close()


Script = Callable[[Conversation], None]


class StandIn:
    """A stand-in that runs.

    Attributes:
        path: of the socket.
        received: every request of every connection.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.received: list[Message] = []
        self.failures: list[BaseException] = []

    def wait_received(self, kind: type[Message], wait_s: float = 5.0) -> Message:
        """The first request of that kind, which may still be under way."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            for message in list(self.received):
                if isinstance(message, kind):
                    return message
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} came, but {self.received}")


@contextmanager
def run_stand_in(script: Script, path: Path | None = None) -> Iterator[StandIn]:
    """Runs the script for each connection until the block is left."""
    with contextlib.ExitStack() as stack:
        if path is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="petald-test-"))
            path = Path(folder) / "petald.sock"
        stand_in = StandIn(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(stand_in.path))
            listener.listen(16)
            conversations: list[Conversation] = []
            threads: list[threading.Thread] = []

            def accept() -> None:
                while True:
                    try:
                        sock, _ = listener.accept()
                    except OSError:
                        return
                    conversation = Conversation(sock, stand_in.received)
                    conversations.append(conversation)
                    thread = threading.Thread(target=serve, args=(conversation,), daemon=True)
                    threads.append(thread)
                    thread.start()

            def serve(conversation: Conversation) -> None:
                try:
                    script(conversation)
                except BaseException as error:
                    stand_in.failures.append(error)
                finally:
                    conversation.close()

            acceptor = threading.Thread(target=accept, daemon=True)
            acceptor.start()
            try:
                yield stand_in
            finally:
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                acceptor.join()
                for conversation in conversations:
                    conversation.hang_up()
                for thread in threads:
                    thread.join()
    if stand_in.failures:
        raise stand_in.failures[0]


def chain_progress(job: int) -> Progress:
    return Progress(job=job, event="chain", text="two hops", chain=CHAIN)


def pieces(job: int, texts: Sequence[str]) -> list[Message]:
    return [Generated(job=job, tokens=(n + 1,), text=text) for n, text in enumerate(texts)]


def done(job: int, texts: Sequence[str], *, finish_reason: str = "stop") -> GenerateDone:
    return GenerateDone(
        job=job,
        model=MODEL,
        text="".join(texts),
        tokens=tuple(range(1, len(texts) + 1)),
        prompt_tokens=7,
        finish_reason=finish_reason,
        chain=CHAIN,
        timings=Timings(
            first_token_s=0.25,
            steps_per_s=12.5,
            total_s=1.5,
            prefilled_tokens=7,
            hop_compute_s=(0.5, 0.25),
            hop_queue_s=(0.0, 0.125),
        ),
    )


def status_report(job: int) -> StatusReport:
    return StatusReport(
        job=job,
        version="0.1.0",
        peer="12D3KooWThisDaemonsOwnPeerIdXXXXXXXXXXXXXXXXXXXXXXXX",
        addresses=("/ip4/127.0.0.1/tcp/4001",),
        pid=4242,
        uptime_s=3723.0,
        roles=("serve", "route"),
        models=(MODEL,),
        peers=(
            PeerStatus(
                peer=CHAIN[0].peer,
                addresses=(f"/ip4/10.0.0.7/tcp/4001/p2p/{CHAIN[0].peer}",),
                round_trip_s=0.0123,
                bytes_per_s=2_500_000,
            ),
            PeerStatus(peer=CHAIN[1].peer),
        ),
        jobs=1,
        span=SpanStatus(
            model=MODEL,
            fingerprint="ab" * 32,
            start=0,
            end=2,
            state="serving",
            dtype="bfloat16",
            quant="nf4",
            device="cpu",
            weight_bytes=123_000_000,
            cache_tokens=8192,
            free_cache_tokens=8000,
            sessions=2,
            decode_steps=1234,
            prefill_steps=5,
        ),
        sent=(CodecCount(codec="int8", messages=812), CodecCount(codec="raw", messages=40)),
    )


def swarm_report(job: int, *, coverage: tuple[int, ...] = (2, 2, 1, 0)) -> SwarmReport:
    common = {"state": "serving", "dtype": "float32", "cache_tokens": 8192}
    return SwarmReport(
        job=job,
        models=(
            ModelSwarm(
                model=MODEL,
                fingerprint="ab" * 32,
                blocks=len(coverage),
                coverage=coverage,
                servers=(
                    ServerStatus(
                        peer=CHAIN[0].peer,
                        start=0,
                        end=2,
                        quant="none",
                        codec="auto",
                        steps_per_s=31.25,
                        free_cache_tokens=8000,
                        round_trip_s=0.0007,
                        **common,
                    ),
                    ServerStatus(
                        peer=CHAIN[1].peer,
                        start=0,
                        end=3,
                        quant="int8",
                        codec="auto",
                        steps_per_s=20.0,
                        free_cache_tokens=0,
                        **common,
                    ),
                ),
            ),
        ),
    )


def answer_everything(conversation: Conversation) -> None:
    """Answers each request as a daemon in good order would."""
    while (request := conversation.receive()) is not None:
        if isinstance(request, StatusRequest):
            conversation.send(status_report(request.job))
        elif isinstance(request, SwarmRequest):
            if request.model not in ("", MODEL):
                text = f"this daemon does not route for {request.model!r}"
                conversation.send(JobFailed(job=request.job, code="unknown_model", text=text))
            else:
                conversation.send(swarm_report(request.job))
        elif isinstance(request, Generate):
            texts = ["Hello", ", ", "world"]
            conversation.send(chain_progress(request.job), *pieces(request.job, texts))
            conversation.send(done(request.job, texts))
        elif isinstance(request, CloseSession):
            conversation.send(SessionClosed(job=request.job))
        elif isinstance(request, Pause):
            conversation.send(Paused(job=request.job, sessions=3, left=1))
        elif isinstance(request, Resume):
            conversation.send(Resumed(job=request.job))


def refuse_everything(conversation: Conversation) -> None:
    """Ends every job with an error whose text means no good."""
    while (request := conversation.receive()) is not None:
        text = "blocks 2:4 are held by nobody \x1b[31mred"
        conversation.send(JobFailed(job=request.job, code="missing_blocks", text=text))  # type: ignore[attr-defined]


def speak_until_cancelled(conversation: Conversation) -> None:
    """Makes a token each few milliseconds until the job is cancelled."""
    while (request := conversation.receive()) is not None:
        if not isinstance(request, Generate):
            continue
        conversation.send(chain_progress(request.job))
        count = 0
        while True:
            count += 1
            conversation.send(Generated(job=request.job, tokens=(count,), text=f"w{count} "))
            heard = conversation.poll(0.005)
            if isinstance(heard, Cancel) and heard.job == request.job:
                conversation.send(JobFailed(job=request.job, code="cancelled", text="cancelled"))
                break
            if conversation.has_ended:
                return
            if count > 2000:
                raise AssertionError("nobody cancelled the job")
