"""The client of those who train: adapters, forward and backward passes, sessions of hidden states.

It moves bytes: what they mean is the business of `petalctl.torch`, so that this imports no torch.
The first Ctrl-C ends what is being done, and leaves the connection as it was. Invariant: a frame is
sent whole, and a forward pass whose number nobody gets is not kept.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from p2p.wire.adapter_messages import AdapterShape
from p2p.wire.control_messages import CloseSession, Progress, SessionClosed
from p2p.wire.message import M, expect
from p2p.wire.tensor import WireTensor
from p2p.wire.training_messages import (
    ROWS_BYTES,
    AdapterGradient,
    AdapterKept,
    BackwardBatch,
    BackwardDone,
    BatchRows,
    ForgetForward,
    ForwardBatch,
    ForwardDone,
    HiddenOpened,
    HiddenStepDone,
    OpenHiddenSession,
    PutAdapter,
    RunHiddenStep,
)
from petalctl.client import Client, OnProgress
from petalctl.connection import Answer, Request
from petalctl.errors import CommandError, JobError
from petalctl.interrupts import Interrupt, hold_interrupt, on_first_interrupt

LARGE_RECEIVE_BYTES = 1 << 20
"""What is read at once where megabytes come: each piece costs a walk through the parser."""

STEPS_AT_ONCE = 32
"""Half of the jobs that a daemon takes from one connection."""

OnRows = Callable[[BatchRows], None]
OnGradient = Callable[[AdapterGradient], None]


@dataclass(slots=True)
class _UnderWay:
    """Jobs that end together, and whether Ctrl-C was pressed meanwhile."""

    client: TrainingClient
    jobs: list[int] = field(default_factory=list)
    interrupt: Interrupt = field(default_factory=Interrupt)

    def begin(self, request: Request) -> int:
        job = self.client._begin(request)
        self.jobs.append(job)
        if self.interrupt.has_come:  # before the job was in the list
            self.cancel()
        return job

    def cancel(self) -> None:
        for job in list(self.jobs):
            self.client._send(self.client._connection.cancel(job))


class TrainingClient(Client):
    """A `petalctl.Client` that also runs passes.

    Args and errors are those of `petalctl.Client`.
    """

    def put_adapter(
        self,
        adapter: int,
        *,
        shape: AdapterShape,
        start: int,
        end: int,
        values: WireTensor,
        model: str = "",
    ) -> None:
        """Gives the daemon an adapter, for passes and sessions on this connection.

        Args:
            adapter: the number under which they name it; an old one of that number is replaced.
            shape: what it consists of.
            start: its first block.
            end: the block after its last one.
            values: ``[blocks, numbers of a block]``, uncompressed.
            model: a name that the daemon routes for.

        Raises:
            JobError: it does not fit the model.
            DaemonUnreachable: there was no answer.
        """
        row_bytes = max(1, len(values.data) // max(1, end - start))
        most = max(1, ROWS_BYTES // row_bytes)
        for first in range(start, end, most):
            part = rows_between(values, first - start, min(first + most, end) - start)
            request = PutAdapter(
                job=0,
                model=model,
                adapter=adapter,
                form=shape,
                start=start,
                end=end,
                first=first,
                values=part,
            )
            self._run(request, AdapterKept, wait_s=self._answer_timeout_s)

    def run_forward(
        self,
        request: ForwardBatch,
        rows: WireTensor,
        *,
        on_rows: OnRows,
        on_progress: OnProgress | None = None,
    ) -> tuple[int, ForwardDone]:
        """Runs a batch through blocks; gives the job's number, by which `run_backward` knows it.

        Args:
            request: what to run.
            rows: ``[sequences * tokens, hidden]``, uncompressed.
            on_rows: takes the output's rows, as they come, in any order.
            on_progress: called with what happens to the job.

        Raises:
            JobError: the daemon did not do it.
            DaemonUnreachable: the connection is gone.
            KeyboardInterrupt: Ctrl-C was pressed; the connection can be used on.
        """
        jobs: list[int] = []

        def take(answer: Answer) -> None:
            if isinstance(answer, BatchRows):
                on_rows(answer)
            elif isinstance(answer, Progress) and on_progress is not None:
                on_progress(answer)

        try:
            done = self._run(
                request,
                ForwardDone,
                rows=rows,
                tokens=request.tokens,
                take=take,
                on_begin=jobs.append,
            )
        except JobError:  # the daemon keeps nothing
            raise
        except BaseException:
            if request.is_kept and jobs:
                with contextlib.suppress(CommandError):
                    self.forget_forward(jobs[0])
            raise
        return jobs[0], done

    def run_backward(
        self,
        forward: int,
        rows: WireTensor,
        *,
        tokens: int,
        on_rows: OnRows,
        on_gradient: OnGradient,
        on_progress: OnProgress | None = None,
    ) -> BackwardDone:
        """Takes the output's gradient back through a forward pass that was kept.

        Args:
            forward: the number of the forward pass.
            rows: ``[sequences * tokens, hidden]``, uncompressed.
            tokens: of each sequence.
            on_rows: takes the rows of the input's gradient, as they come, in any order.
            on_gradient: takes the adapter's gradient, likewise.
            on_progress: called with what happens to the job.

        Raises:
            As `run_forward`; `JobError` of the code ``unknown_forward`` where it is not kept.
        """

        def take(answer: Answer) -> None:
            if isinstance(answer, BatchRows):
                on_rows(answer)
            elif isinstance(answer, AdapterGradient):
                on_gradient(answer)
            elif isinstance(answer, Progress) and on_progress is not None:
                on_progress(answer)

        request = BackwardBatch(job=0, forward=forward)
        return self._run(request, BackwardDone, rows=rows, tokens=tokens, take=take)

    def forget_forward(self, forward: int) -> None:
        """Gives up a forward pass that was kept, and does not wait."""
        job = self._begin(ForgetForward(job=0, forward=forward))
        self._connection.abandon(job)

    def open_hidden_session(self, request: OpenHiddenSession) -> HiddenOpened:
        """Opens a session through the whole model for hidden states.

        Raises:
            JobError, DaemonUnreachable: it could not be opened.
        """
        return self._run(request, HiddenOpened)

    def run_hidden_step(self, request: RunHiddenStep) -> HiddenStepDone:
        """Runs new tokens through such a session.

        Raises:
            JobError, DaemonUnreachable: it could not be done.
        """
        return self._run(request, HiddenStepDone)

    def run_hidden_steps(self, requests: Sequence[RunHiddenStep]) -> list[HiddenStepDone]:
        """Runs steps of several sessions at once, so that servers can batch them.

        Args:
            requests: each of another session.

        Raises:
            JobError, DaemonUnreachable: one could not be done; the others are given up.
        """
        answers: list[HiddenStepDone] = []
        for first in range(0, len(requests), STEPS_AT_ONCE):
            with self._under_way() as under_way:
                jobs = [under_way.begin(step) for step in requests[first : first + STEPS_AT_ONCE]]
                answers += [expect(self._next_answer(job), HiddenStepDone) for job in jobs]
        return answers

    def close_hidden_session(self, session: str) -> None:
        """Ends such a session."""
        self._ask(CloseSession(job=0, session=session), SessionClosed)

    def _send(self, data: bytes) -> None:
        is_whole = False
        try:
            with hold_interrupt():
                super()._send(data)
                is_whole = True
        finally:
            if not is_whole:  # Ctrl-C was pressed twice, in the middle of a frame
                self.close()

    @contextmanager
    def _under_way(self) -> Iterator[_UnderWay]:
        """What is begun in the block is cancelled by Ctrl-C, and given up with the block's end."""
        under_way = _UnderWay(self)
        with on_first_interrupt(under_way.cancel) as under_way.interrupt:
            try:
                yield under_way
            except CommandError as error:
                if under_way.interrupt.has_come and error.code == "cancelled":
                    raise KeyboardInterrupt from None
                raise
            finally:
                for job in under_way.jobs:
                    self._send(self._connection.abandon(job))
        if under_way.interrupt.has_come:  # too late for the daemon
            raise KeyboardInterrupt

    def _run(
        self,
        request: Request,
        kind: type[M],
        *,
        rows: WireTensor | None = None,
        tokens: int = 1,
        take: Callable[[Answer], None] | None = None,
        on_begin: Callable[[int], None] | None = None,
        wait_s: float | None = None,
    ) -> M:
        """Does a job; what comes before its result is taken while the rows are sent, and after."""
        deadline = None if wait_s is None else time.monotonic() + wait_s
        if rows is not None:
            self._receive_bytes = LARGE_RECEIVE_BYTES
        with self._under_way() as under_way:
            job = under_way.begin(request)
            if on_begin is not None:
                on_begin(job)
            frames = self._frames(job, rows, tokens)
            while True:
                answer = self._connection.next_answer(job)
                if answer is not None:
                    if take is None or isinstance(answer, kind):
                        return expect(answer, kind)
                    take(answer)
                elif not under_way.interrupt.has_come and (frame := next(frames, None)):
                    self._send(frame)
                    self._receive_nowait()
                else:
                    self._receive(deadline)

    def _frames(self, job: int, rows: WireTensor | None, tokens: int) -> Iterator[bytes]:
        if rows is None:
            return
        count = rows.shape[0]
        sequence_bytes = max(1, len(rows.data) * tokens // count)
        step = max(1, ROWS_BYTES // sequence_bytes) * tokens
        if sequence_bytes > ROWS_BYTES:  # whole sequences are better, but not needed
            step = max(1, ROWS_BYTES * count // len(rows.data))
        for first in range(0, count, step):
            part = rows_between(rows, first, min(first + step, count))
            yield self._connection.rows_frame(job, first, part)

    def _receive_nowait(self) -> None:
        """Takes what has come: the daemon gives up an app that reads nothing for long."""
        try:
            while data := self._socket.recv(self._receive_bytes, socket.MSG_DONTWAIT):
                self._connection.receive_data(data)
        except BlockingIOError:
            return
        except OSError:
            pass
        self._connection.receive_data(b"")


def rows_between(tensor: WireTensor, start: int, end: int) -> WireTensor:
    """Some rows of an uncompressed tensor; shares its memory."""
    row_bytes = len(tensor.data) // tensor.shape[0]
    data = memoryview(tensor.data)[start * row_bytes : end * row_bytes]
    return WireTensor(tensor.dtype, (end - start, *tensor.shape[1:]), data, tensor.codec)
