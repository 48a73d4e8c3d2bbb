"""The client of those who train: adapters, forward and backward passes, sessions of hidden states.

It moves bytes: what they mean is the business of `petalctl.torch`, so that this imports no torch. A
batch's rows are sent whole before the answer is read; the daemon takes them in without waiting.
Ctrl-C ends the pass, and leaves the connection as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
from petalctl.errors import CommandError
from petalctl.interrupts import on_first_interrupt

LARGE_RECEIVE_BYTES = 1 << 20
"""What is read at once where megabytes come: each piece costs a walk through the parser."""

OnRows = Callable[[BatchRows], None]
OnGradient = Callable[[AdapterGradient], None]


@dataclass(slots=True)
class _Passing:
    """A pass that is being run.

    Attributes:
        is_sending: a frame is being written, which nothing may be written into.
    """

    job: int
    is_sending: bool = False
    is_interrupted: bool = False


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
            self._ask(request, AdapterKept)

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

        def take(answer: Answer) -> None:
            if isinstance(answer, BatchRows):
                on_rows(answer)
            elif isinstance(answer, Progress) and on_progress is not None:
                on_progress(answer)

        job = self._begin(request)
        done = self._run_pass(job, rows, request.tokens, take)
        return job, expect(done, ForwardDone)

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

        job = self._begin(BackwardBatch(job=0, forward=forward))
        return expect(self._run_pass(job, rows, tokens, take), BackwardDone)

    def forget_forward(self, forward: int) -> None:
        """Gives up a forward pass that was kept, and does not wait."""
        job = self._begin(ForgetForward(job=0, forward=forward))
        self._connection.abandon(job)

    def open_hidden_session(self, request: OpenHiddenSession) -> HiddenOpened:
        """Opens a session through the whole model for hidden states.

        Raises:
            JobError, DaemonUnreachable: it could not be opened.
        """
        return self._wait(request, HiddenOpened)

    def run_hidden_step(self, request: RunHiddenStep) -> HiddenStepDone:
        """Runs new tokens through such a session.

        Raises:
            JobError, DaemonUnreachable: it could not be done.
        """
        return self._wait(request, HiddenStepDone)

    def close_hidden_session(self, session: str) -> None:
        """Ends such a session."""
        self._ask(CloseSession(job=0, session=session), SessionClosed)

    def _wait(self, request: Request, kind: type[M]) -> M:
        job = self._begin(request)
        try:
            return expect(self._next_answer(job), kind)
        finally:
            self._send(self._connection.abandon(job))

    def _run_pass(
        self, job: int, rows: WireTensor, tokens: int, take: Callable[[Answer], None]
    ) -> Answer:
        passing = _Passing(job)

        def interrupt() -> None:
            passing.is_interrupted = True
            if not passing.is_sending:
                self._send(self._connection.cancel(job))

        self._receive_bytes = LARGE_RECEIVE_BYTES
        try:
            with on_first_interrupt(interrupt):
                self._send_rows(passing, rows, tokens)
                while True:
                    answer = self._next_answer(job)
                    if isinstance(answer, ForwardDone | BackwardDone):
                        break
                    take(answer)
            if passing.is_interrupted:  # too late for the daemon
                raise KeyboardInterrupt
            return answer
        except CommandError as error:
            if passing.is_interrupted and error.code == "cancelled":
                raise KeyboardInterrupt from None
            raise
        except BaseException:
            if passing.is_sending:  # in the middle of a frame
                self.close()
            else:
                self._send(self._connection.abandon(job))
            raise

    def _send_rows(self, passing: _Passing, rows: WireTensor, tokens: int) -> None:
        count = rows.shape[0]
        sequence_bytes = max(1, len(rows.data) * tokens // count)
        step = max(1, ROWS_BYTES // sequence_bytes) * tokens
        if sequence_bytes > ROWS_BYTES:  # whole sequences are better, but not needed
            step = max(1, ROWS_BYTES * count // len(rows.data))
        for first in range(0, count, step):
            part = rows_between(rows, first, min(first + step, count))
            frame = self._connection.rows_frame(passing.job, first, part)
            passing.is_sending = True
            self._send(frame)
            passing.is_sending = False
            if passing.is_interrupted:
                self._send(self._connection.cancel(passing.job))
                return


def rows_between(tensor: WireTensor, start: int, end: int) -> WireTensor:
    """Some rows of an uncompressed tensor; shares its memory."""
    row_bytes = len(tensor.data) // tensor.shape[0]
    data = memoryview(tensor.data)[start * row_bytes : end * row_bytes]
    return WireTensor(tensor.dtype, (end - start, *tensor.shape[1:]), data, tensor.codec)
