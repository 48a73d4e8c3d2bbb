"""The jobs of those who train: adapters, forward and backward passes, for one app's connection.

What an app put, and the forward passes that are kept for it, belong to its connection and go with
it. Invariant: a connection never keeps more than this module's limits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
import trio

from kernels.adapter_form import row_elements
from kernels.errors import BadAdapter
from p2p.errors import RemoteProtocolError
from p2p.wire.control_messages import Chain, ChainHop
from p2p.wire.message import Message
from p2p.wire.tensor import WireTensor
from p2p.wire.training_messages import (
    MAX_CHAINS,
    ROWS_BYTES,
    AdapterGradient,
    AdapterKept,
    BackwardBatch,
    BackwardDone,
    BatchRows,
    ForwardBatch,
    ForwardDone,
    PassTimings,
    PutAdapter,
)
from petald.adapter_store import adapter_rows, read_shape
from petald.batch_pass import BatchForm, BatchPass
from petald.batch_rows import IncomingRows
from petald.errors import BadRequest, UnknownForward, raise_alone
from petald.job_news import JobNews
from petald.lanes import LaneKeeper
from petald.lent_adapter import LentAdapter
from petald.local_model import LocalModels, ModelIdentity
from petald.pass_chooser import ModelPassChooser
from petald.pass_link import PassLinks
from petald.router import Router
from petald.tensors import all_finite, mask_from_wire, plain_tensor, slice_rows

MAX_KEPT_FORWARDS = 256
"""A backward pass follows its forward pass, mostly; a loss over some hundred texts, or a model cut
into parts by modules between its blocks, has several under way."""

MAX_ADAPTERS = 16
MAX_ADAPTER_BYTES = 1 << 32
MAX_BATCH_TOKENS = 1 << 26

T = TypeVar("T")

Send = Callable[[Message], Awaitable[None]]
BatchRequest = ForwardBatch | BackwardBatch
TrainingRequest = PutAdapter | ForwardBatch | BackwardBatch


@dataclass(eq=False, slots=True)
class _Arriving:
    """An adapter of which some blocks have come."""

    request: PutAdapter
    values_LE: torch.Tensor
    missing: set[int]


@dataclass(eq=False, slots=True)
class TrainingState:
    """What one connection has put, and what is kept for it.

    Attributes:
        adapters: by the numbers that the app chose.
        forwards: by their jobs' numbers; none for those that are still on their way.
    """

    adapters: dict[int, LentAdapter] = field(default_factory=dict)
    forwards: dict[int, BatchPass] = field(default_factory=dict)
    _going_back: set[int] = field(default_factory=set)
    _arriving: dict[int, _Arriving] = field(default_factory=dict)
    _incoming: dict[int, IncomingRows] = field(default_factory=dict)

    def forget(self, forward: int) -> None:
        """Gives up a forward pass, now or, where it is being run back, when that has ended."""
        self._going_back.discard(forward)
        kept = self.forwards.pop(forward, None)
        if kept is not None:
            kept.close()

    def begin_backward(self, forward: int) -> BatchPass:
        """Takes out a forward pass that is to be run back.

        Raises:
            UnknownForward: it is not kept.
        """
        batch = self.forwards.pop(forward, None)
        if batch is None:
            raise UnknownForward(
                f"the forward pass {forward} is not kept here; run it again, and keep it"
            )
        self._going_back.add(forward)
        return batch

    def end_backward(self, forward: int, batch: BatchPass, *, is_done: bool) -> None:
        """Puts a forward pass back whose backward pass failed: it may be tried again."""
        if is_done or forward not in self._going_back:
            batch.close()
        else:
            self.forwards[forward] = batch
        self._going_back.discard(forward)

    def expect_rows(self, job: int, rows: IncomingRows) -> None:
        """Rows that come for a job are these."""
        self._incoming[job] = rows

    def take_rows(self, message: BatchRows) -> None:
        """Takes rows from the socket; those of a job that has ended are dropped."""
        rows = self._incoming.get(message.job)
        if rows is not None:
            rows.take(message.row, message.hidden)

    def incoming(self, job: int) -> IncomingRows:
        """A job's rows."""
        return self._incoming[job]

    def end_rows(self, job: int) -> None:
        """No rows are expected for a job any more."""
        self._incoming.pop(job, None)

    def close(self) -> None:
        """Gives back everything; the connection has ended."""
        for kept in self.forwards.values():
            kept.close()
        for rows in self._incoming.values():
            rows.history.close()
        self.forwards.clear()
        self._incoming.clear()

    def put(self, request: PutAdapter, model: ModelIdentity) -> None:
        """Takes some blocks of an adapter.

        Raises:
            BadAdapter: it does not fit the model, or these blocks do not follow.
        """
        arriving = self._arriving.get(request.adapter)
        if arriving is None or not _continues(arriving.request, request):
            arriving = self._begin(request, model)
        values_LE = _read_values(request, arriving.values_LE.shape[1])
        first = request.first - request.start
        blocks = range(first, first + values_LE.shape[0])
        if first < 0 or not arriving.missing.issuperset(blocks):
            raise BadAdapter(
                f"blocks {request.first}:{request.first + len(blocks)} came for an adapter of "
                f"{request.start}:{request.end}, or came twice"
            )
        arriving.values_LE[first : first + len(blocks)] = values_LE
        arriving.missing.difference_update(blocks)
        if not arriving.missing:
            del self._arriving[request.adapter]
            form = read_shape(request.form)
            self.adapters[request.adapter] = LentAdapter(form, request.start, arriving.values_LE)

    def _begin(self, request: PutAdapter, model: ModelIdentity) -> _Arriving:
        blocks = request.end - request.start
        if not 0 <= request.start < request.end <= model.config.num_blocks:
            raise BadAdapter(
                f"an adapter of blocks {request.start}:{request.end} came; {model.name} has "
                f"0:{model.config.num_blocks}"
            )
        elements = row_elements(model.config, read_shape(request.form))
        if request.values.dtype not in ("float32", "float64"):
            raise BadAdapter(f"an adapter came as {request.values.dtype}; send it as float32")
        dtype = torch.float64 if request.values.dtype == "float64" else torch.float32
        if blocks * elements * dtype.itemsize > MAX_ADAPTER_BYTES:
            raise BadAdapter(f"an adapter of {blocks} x {elements} numbers is too large")
        known = self.adapters.keys() | self._arriving.keys()
        if len(known | {request.adapter}) > MAX_ADAPTERS:
            raise BadAdapter(f"this connection has {MAX_ADAPTERS} adapters; use one again")
        values_LE = torch.empty(blocks, elements, dtype=dtype)
        arriving = _Arriving(request, values_LE, set(range(blocks)))
        self._arriving[request.adapter] = arriving
        return arriving


class TrainingJobs:
    """Runs the jobs; one for all connections of a daemon.

    Args:
        models: that can be named.
        router: knows the swarm.
        links: the streams to servers.
        max_wait_s: how long to wait where nobody can run some blocks, by default.
    """

    def __init__(
        self, models: LocalModels, router: Router, links: PassLinks, *, max_wait_s: float
    ) -> None:
        self._models = models
        self._router = router
        self._links = links
        self._max_wait_s = max_wait_s

    def expect(self, request: BatchRequest, state: TrainingState) -> None:
        """Makes ready for the rows that follow a request."""
        count = 0
        if isinstance(request, ForwardBatch):
            count = request.sequences * request.tokens
        elif request.forward in state.forwards:
            count = state.forwards[request.forward].form.rows
        state.expect_rows(request.job, IncomingRows(self._router.histories.open(), count))

    async def run(self, request: TrainingRequest, state: TrainingState, send: Send) -> None:
        """Does one job, and tells its end.

        Raises:
            PetaldError, KernelError: it could not be done.
        """
        if isinstance(request, PutAdapter):
            state.put(request, await self._models.identify(request.model))
            await send(AdapterKept(job=request.job))
        else:
            try:
                if isinstance(request, ForwardBatch):
                    await self._forward(request, state, send)
                else:
                    await self._backward(request, state, send)
            finally:
                state.end_rows(request.job)

    async def _forward(self, request: ForwardBatch, state: TrainingState, send: Send) -> None:
        rows = state.incoming(request.job)
        batch: BatchPass | None = None
        is_kept = False
        try:
            if request.job in state.forwards or len(state.forwards) >= MAX_KEPT_FORWARDS:
                raise BadRequest(
                    f"job {request.job} is kept already, or {MAX_KEPT_FORWARDS} forward passes "
                    "are; run their backward passes, or forget them, first"
                )
            model = await self._models.identify(request.model)
            form = _read_form(request, model, state)
            teller = _Teller(request.job, send)
            max_wait_s = self._max_wait_s if request.max_wait_s is None else request.max_wait_s
            if request.hosted:
                hosted = await self._router.find_hosted(
                    model, request.hosted, start=form.start, end=form.end
                )
                form = replace(form, hosted=hosted)
            chooser = ModelPassChooser(self._router, model, hosted=form.hosted)
            batch = BatchPass(
                form,
                model,
                keeper=LaneKeeper(chooser, max_wait_s, teller.news.on_news),
                links=self._links,
                histories=self._router.histories,
                codecs=self._router.codecs,
                codec=self._router.codec,
                gradient_codec=self._router.gradient_codec,
            )
            await teller.run(partial(batch.run_forward, rows, teller.send_rows))
            if request.is_kept:
                state.forwards[request.job] = batch
            else:  # before the app hears of the end
                batch.close()
            await send(
                ForwardDone(
                    job=request.job,
                    timings=teller.timings(batch),
                    chains=_wire_chains(batch),
                    moves=tuple(teller.news.moves),
                )
            )
            is_kept = request.is_kept
        finally:
            if not is_kept:
                rows.history.close()
                if batch is not None:
                    batch.close()
                    if state.forwards.get(request.job) is batch:
                        del state.forwards[request.job]

    async def _backward(self, request: BackwardBatch, state: TrainingState, send: Send) -> None:
        rows = state.incoming(request.job)
        try:
            batch = state.begin_backward(request.forward)
            is_done = False
            try:
                teller = _Teller(request.job, send)
                batch.keeper.on_news = teller.news.on_news
                batch.keeper.repeated = 0
                gradient_LE = await teller.run(partial(batch.run_backward, rows, teller.send_rows))
                timings, chains = teller.timings(batch), _wire_chains(batch)
                is_done = True
            finally:
                state.end_backward(request.forward, batch, is_done=is_done)
            rows.history.close()
            if gradient_LE is not None:
                await _send_gradient(request.job, batch.form.start, gradient_LE, send)
            await send(
                BackwardDone(
                    job=request.job, timings=timings, chains=chains, moves=tuple(teller.news.moves)
                )
            )
        finally:
            rows.history.close()


class _Teller:
    """What the app is told of a pass."""

    def __init__(self, job: int, send: Send) -> None:
        self.news = JobNews(job, send)
        self._job = job
        self._send = send
        self._began_at = trio.current_time()

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does the work, and tells the news meanwhile."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.news.tell)
                result = await work()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise_alone(group)
        return result

    async def send_rows(self, row: int, hidden: WireTensor) -> None:
        count = hidden.shape[0]
        most = max(1, ROWS_BYTES * count // len(hidden.data))
        for first in range(0, count, most):
            part = slice_rows(hidden, slice(first, min(first + most, count)))
            await self._send(BatchRows(job=self._job, row=row + first, hidden=part))

    def timings(self, batch: BatchPass) -> PassTimings:
        counts = batch.counts
        return PassTimings(
            total_s=trio.current_time() - self._began_at,
            pieces=counts.pieces,
            hop_compute_s=counts.compute_us / 1e6,
            hop_queue_s=counts.queue_us / 1e6,
            repeated=batch.keeper.repeated,
        )


def _read_form(request: ForwardBatch, model: ModelIdentity, state: TrainingState) -> BatchForm:
    end = request.end or model.config.num_blocks
    if not request.start < end <= model.config.num_blocks:
        raise BadRequest(
            f"blocks {request.start}:{end} were asked for; {model.name} has "
            f"0:{model.config.num_blocks}"
        )
    rows = request.sequences * request.tokens
    if not 0 < rows <= MAX_BATCH_TOKENS:
        raise BadRequest(
            f"a batch of {request.sequences} x {request.tokens} tokens came; "
            f"1 to {MAX_BATCH_TOKENS} were expected"
        )
    if request.mask is not None:
        try:
            mask_from_wire(request.mask, request.sequences, request.tokens)
        except RemoteProtocolError as error:
            raise BadRequest(f"the mask does not fit the batch: {error}") from error
    adapter = None
    if request.adapter is not None:
        adapter = state.adapters.get(request.adapter)
        if adapter is None:
            raise BadRequest(f"no adapter {request.adapter} was put on this connection")
        if not adapter.start <= request.start < end <= adapter.end:
            raise BadRequest(
                f"the adapter is for blocks {adapter.start}:{adapter.end}; "
                f"{request.start}:{end} are to be run with it"
            )
        if adapter.values_LE.shape[1] != row_elements(model.config, adapter.form):
            raise BadRequest(f"the adapter was put for another model than {model.name}")
    return BatchForm(
        start=request.start,
        end=end,
        sequences=request.sequences,
        tokens=request.tokens,
        mask=request.mask,
        adapter=adapter,
        hosted=request.hosted or None,
        is_kept=request.is_kept,
        pieces_under_way=request.pieces_under_way,
    )


def _continues(before: PutAdapter, request: PutAdapter) -> bool:
    """Whether these are more blocks of an adapter of which some came."""
    said = [
        (one.model, one.form, one.start, one.end, one.values.dtype) for one in (before, request)
    ]
    return said[0] == said[1] and request.first != request.start


def _read_values(request: PutAdapter, elements: int) -> torch.Tensor:
    shape = request.values.shape
    if len(shape) != 2 or not shape[0] or shape[1] != elements:
        raise BadAdapter(
            f"the adapter's numbers have the shape {list(shape)}; [blocks, {elements}] was expected"
        )
    try:
        values_LE = plain_tensor(request.values)
    except RemoteProtocolError as error:
        raise BadAdapter(f"the adapter cannot be read: {error}") from error
    if not all_finite(values_LE):
        raise BadAdapter("the adapter has numbers that are not finite; lower the learning rate")
    return values_LE


async def _send_gradient(job: int, start: int, gradient_LE: torch.Tensor, send: Send) -> None:
    row_bytes = gradient_LE.shape[1] * gradient_LE.itemsize
    most = max(1, ROWS_BYTES // row_bytes)
    for first in range(0, gradient_LE.shape[0], most):
        values = adapter_rows(gradient_LE[first : first + most])
        await send(AdapterGradient(job=job, first=start + first, values=values))


def _wire_chains(batch: BatchPass) -> tuple[Chain, ...]:
    return tuple(
        tuple(ChainHop(peer=hop.peer, start=hop.start, end=hop.end) for hop in chain)
        for chain in batch.chains[:MAX_CHAINS]
    )
