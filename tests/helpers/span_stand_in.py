"""A stand-in for a daemon that trains: a local span computes what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kernels.adapter import SpanAdapter
from kernels.adapter_form import AdapterForm
from kernels.model_config import ModelConfig
from kernels.span import Span
from p2p.wire.adapter_messages import AdapterShape
from p2p.wire.control_messages import Cancel, CloseSession, JobFailed, SessionClosed
from p2p.wire.message import Message
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
    PassTimings,
    PutAdapter,
    RunHiddenStep,
)
from petalctl.torch.wire_tensors import from_wire, to_wire
from tests.helpers.control_stand_in import Conversation

TIMINGS = PassTimings(total_s=1.0, pieces=1, hop_compute_s=1.0, hop_queue_s=0.0)


@dataclass
class Kept:
    """A forward pass with its graph."""

    request: ForwardBatch
    inputs: torch.Tensor
    values: torch.Tensor | None
    output: torch.Tensor


@dataclass
class Session:
    adapters: list[SpanAdapter]
    hidden: list[torch.Tensor] = field(default_factory=list)


class SpanDaemon:
    """Speaks for the blocks of a span, on one connection; `__call__` is the script.

    Attributes:
        kept: forward passes, by their jobs' numbers.
        sessions: that are open.
        on_request: sees every request first.
    """

    def __init__(self, config: ModelConfig, span: Span) -> None:
        self.config = config
        self.span = span
        self.kept: dict[int, Kept] = {}
        self.sessions: dict[str, Session] = {}
        self.adapters: dict[int, tuple[AdapterForm, int, list[torch.Tensor]]] = {}
        self.on_request: Callable[[Message], None] = lambda _: None

    def __call__(self, conversation: Conversation) -> None:
        while (request := conversation.receive()) is not None:
            self.on_request(request)
            if isinstance(request, PutAdapter):
                self._put(request)
                conversation.send(AdapterKept(job=request.job))
            elif isinstance(request, ForwardBatch):
                self._forward(conversation, request)
            elif isinstance(request, BackwardBatch):
                self._backward(conversation, request)
            elif isinstance(request, ForgetForward):
                self.kept.pop(request.forward, None)
                conversation.send(ForwardForgotten(job=request.job))
            elif isinstance(request, OpenHiddenSession):
                adapter = self._adapter(request.adapter)
                self.sessions[request.session] = Session([adapter] if adapter else [])
                conversation.send(HiddenOpened(job=request.job))
            elif isinstance(request, RunHiddenStep):
                conversation.send(self._step(request))
            elif isinstance(request, CloseSession):
                del self.sessions[request.session]
                conversation.send(SessionClosed(job=request.job))
            elif not isinstance(request, Cancel | BatchRows):  # rows of a job that has ended
                raise AssertionError(f"{request} came")

    def _put(self, request: PutAdapter) -> None:
        if request.first == request.start:
            self.adapters[request.adapter] = (_form(request.form), request.start, [])
        self.adapters[request.adapter][2].append(from_wire(request.values))

    def _adapter(self, number: int | None) -> SpanAdapter | None:
        if number is None:
            return None
        form, start, parts = self.adapters[number]
        return SpanAdapter(self.config, form, start, torch.cat(parts).to(self.span.dtype))

    def _forward(self, conversation: Conversation, request: ForwardBatch) -> None:
        shape = (request.sequences, request.tokens, self.config.hidden_size)
        inputs = self._receive_rows(conversation, request.job, shape).requires_grad_()
        adapter = self._adapter(request.adapter)
        values = adapter.values_LE.requires_grad_() if adapter else None
        mask = None
        if request.mask is not None:
            bits = torch.frombuffer(bytearray(request.mask.data), dtype=torch.uint8)
            mask = bits.view(shape[:2]) != 0
        output = self.span.forward(
            inputs,
            start=request.start,
            end=request.end or self.span.end,
            mask_BS=mask,
            adapters=[adapter] if adapter else [],
        )
        if request.is_kept:
            self.kept[request.job] = Kept(request, inputs, values, output)
        self._send_rows(conversation, request.job, output)
        conversation.send(ForwardDone(job=request.job, timings=TIMINGS))

    def _backward(self, conversation: Conversation, request: BackwardBatch) -> None:
        kept = self.kept.pop(request.forward, None)
        if kept is None:
            text = "it is not kept"
            conversation.send(JobFailed(job=request.job, code="unknown_forward", text=text))
            return
        gradient = self._receive_rows(conversation, request.job, kept.output.shape)
        wanted = [kept.inputs] if kept.values is None else [kept.inputs, kept.values]
        found = torch.autograd.grad(kept.output, wanted, gradient)
        if kept.values is not None:
            first, last = kept.request.start, kept.request.end or self.span.end
            values = to_wire(found[1][first:last])
            conversation.send(AdapterGradient(job=request.job, first=first, values=values))
        self._send_rows(conversation, request.job, found[0])
        conversation.send(BackwardDone(job=request.job, timings=TIMINGS))

    def _receive_rows(
        self, conversation: Conversation, job: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        while sum(map(len, parts)) < shape[0] * shape[1]:
            message = conversation.receive()
            assert isinstance(message, BatchRows)
            if message.job != job:
                continue
            assert message.row == sum(map(len, parts))
            parts.append(from_wire(message.hidden).to(self.span.dtype))
        return torch.cat(parts).view(shape).clone()

    def _send_rows(self, conversation: Conversation, job: int, rows: torch.Tensor) -> None:
        for sequence in reversed(range(len(rows))):
            row = sequence * rows.shape[1]
            conversation.send(BatchRows(job=job, row=row, hidden=to_wire(rows[sequence])))

    def _step(self, request: RunHiddenStep) -> HiddenStepDone:
        session = self.sessions[request.session]
        before = torch.cat(session.hidden)[: request.position] if session.hidden else None
        rows = from_wire(request.hidden)
        assert request.position == (0 if before is None else len(before))
        session.hidden = [rows.to(self.span.dtype)] if before is None else [before, rows]
        whole = torch.cat(session.hidden).to(self.span.dtype)
        with torch.no_grad():
            output = self.span.forward(whole[None], adapters=session.adapters)[0]
        return HiddenStepDone(job=request.job, hidden=to_wire(output[-1:].to(rows.dtype)))


def _form(shape: AdapterShape) -> AdapterForm:
    return AdapterForm(
        targets=shape.targets,
        rank=shape.rank,
        scaling=shape.scaling,
        prefix_tokens=shape.prefix_tokens,
    )
