"""A batch's way through the swarm and back: pieces, pipelined through the hops of parallel lanes.

Every piece is a task of its own, which asks one hop after the other. A hop keeps nothing, so what
it fails to do is asked of another, and nothing else is repeated. For the way back, the input of
every hop is kept in a history. Where the blocks of a hop are then run by several others, the inputs
between them are computed anew. Invariant: a piece's gradient of the adapter is added once, when the
hop's answer has been checked.

Shapes: D hidden size, L blocks, E numbers of an adapter's block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
import trio

from kernels.adapter_form import row_elements
from kernels.errors import BadAdapter, KernelError
from p2p.errors import RemoteProtocolError
from p2p.wire.pass_messages import CODE_NOT_FINITE, CODE_SEQUENCE_TOO_LONG
from p2p.wire.session_messages import HopTime
from p2p.wire.tensor import RAW, WireTensor
from petald.batch_rows import IncomingRows
from petald.errors import BadRequest, HopFailed, NotFinite, raise_alone
from petald.history import HistoryStore, InputHistory
from petald.lanes import Lane, LaneKeeper, largest_hop, make_lanes
from petald.lent_adapter import LentAdapter
from petald.local_model import ModelIdentity
from petald.message_codecs import MessageCodecs, may_come_as
from petald.parallel_routing import ChainShare
from petald.pass_link import LinkKey, PassLink, PassLinks, PassPiece
from petald.pass_pieces import cut_batch
from petald.routing import Hop
from petald.tensors import (
    all_finite,
    check_rows,
    from_wire,
    join_rows,
    off_loop,
    plain_tensor,
    slice_rows,
    to_wire,
)

MAX_LANES = 8

PIECES_PER_HOP = 2
"""Under way at once: one is computed, the next is on its way."""

DISAGREEING_PEERS = 2
"""So many servers that give numbers which are not finite for one piece are not all at fault."""

R = TypeVar("R")

SendRows = Callable[[int, WireTensor], Awaitable[None]]
"""Takes the first row's number and the rows, ``[rows, D]``, uncompressed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchForm:
    """What a batch is.

    Attributes:
        start: first block.
        end: the block after the last one.
        sequences: how many.
        tokens: of each, padding included.
        mask: uint8 ``[sequences, tokens]``; none where all tokens are real.
        adapter: the app's own; covers the blocks.
        hosted: the full name of an adapter that servers host.
        is_kept: the way back will be asked for.
        pieces_under_way: in each lane; 0: as many as keep the hops busy.
    """

    start: int
    end: int
    sequences: int
    tokens: int
    mask: WireTensor | None = None
    adapter: LentAdapter | None = None
    hosted: str | None = None
    is_kept: bool = False
    pieces_under_way: int = 0

    @property
    def rows(self) -> int:
        """Of the whole batch."""
        return self.sequences * self.tokens


@dataclass(eq=False, slots=True)
class _Piece:
    """Some sequences, and where the inputs of their hops are kept.

    Attributes:
        first: the first sequence.
        inputs: of each hop, its first block, and the first of its rows in the history.
        codec: in which the app's own rows go to the first hop.
        not_finite_at: peers that gave numbers which are not finite.
    """

    first: int
    sequences: int
    wire: PassPiece
    inputs: list[tuple[int, int]] = field(default_factory=list)
    codec: str = RAW
    not_finite_at: set[str] = field(default_factory=set)


@dataclass(slots=True)
class PassCounts:
    """What a pass has taken so far."""

    pieces: int = 0
    compute_us: int = 0
    queue_us: int = 0

    def add(self, time: HopTime) -> None:
        """Counts one hop's time."""
        self.compute_us += time.compute_us
        self.queue_us += time.queue_us


class BatchPass:
    """A forward pass, and what is kept of it for the way back.

    Args:
        form: of the batch.
        model: whose blocks they are.
        keeper: chooses and replaces servers.
        links: the streams to them.
        histories: where inputs are kept.
        codecs: encode what the app sends.
        codec: of hidden states on their way.
        gradient_codec: of gradients of hidden states, likewise.
    """

    def __init__(
        self,
        form: BatchForm,
        model: ModelIdentity,
        *,
        keeper: LaneKeeper,
        links: PassLinks,
        histories: HistoryStore,
        codecs: MessageCodecs,
        codec: str = RAW,
        gradient_codec: str = RAW,
    ) -> None:
        self.form = form
        self.counts = PassCounts()
        self.keeper = keeper
        self._model = model
        self._links = links
        self._codecs = codecs
        self._codec = codec
        self._gradient_codec = gradient_codec
        self._lanes: list[Lane] = []
        self._pieces: list[_Piece] = []
        self._own: InputHistory | None = None
        self._between = histories.open()
        self._gradient_LE: torch.Tensor | None = None

    @property
    def chains(self) -> tuple[tuple[Hop, ...], ...]:
        """The lanes' hops, as they are now."""
        return tuple(lane.hops for lane in self._lanes)

    async def run_forward(self, rows: IncomingRows, send: SendRows) -> None:
        """Runs the batch through the blocks.

        Args:
            rows: of the input; their history is this pass's from now on.
            send: takes the output's rows, piece by piece, in any order.

        Raises:
            BadRequest: the rows are no such batch.
            MissingBlocks, HopFailed, NotFinite, BadAdapter: the swarm could not do it.
        """
        form = self.form
        self._own = rows.history
        chains = await self.keeper.choose(form.start, form.end, max_lanes=MAX_LANES)
        self._cut(chains)
        self._lanes = make_lanes(self.keeper, chains, len(self._pieces))

        async def run(lane: Lane, piece: _Piece) -> None:
            first = piece.first * form.tokens
            end = first + piece.sequences * form.tokens
            await rows.wait_for(end)
            hidden = await self._read_own(rows.history, first, end)
            piece.codec = self._choose_codec(lane, hidden, self._codec)
            hidden = await self._encode(hidden, piece.codec)
            piece.inputs.append((form.start, first))
            output, borders = await self._forward(lane, piece, form.start, form.end, hidden)
            if form.is_kept:
                for block, between in borders[1:]:
                    piece.inputs.append((block, self._between.rows))
                    self._between.append(between)
            await send(first, await self._plain(output))

        await self._run_lanes(run)

    async def run_backward(self, rows: IncomingRows, send: SendRows) -> torch.Tensor | None:
        """Takes gradients of the output back; gives that of the adapter, ``[L, E]``.

        May be called again after it failed.

        Args:
            rows: of the output's gradient.
            send: takes the rows of the input's gradient, piece by piece, in any order.

        Raises:
            As `run_forward`.
        """
        form = self.form
        self.counts = PassCounts()
        adapter = form.adapter
        if adapter is not None:
            elements = adapter.values_LE.shape[1]
            self._gradient_LE = torch.zeros(
                form.end - form.start, elements, dtype=adapter.values_LE.dtype
            )

        async def run(lane: Lane, piece: _Piece) -> None:
            first = piece.first * form.tokens
            end = first + piece.sequences * form.tokens
            await rows.wait_for(end)
            gradient = await self._read_own(rows.history, first, end)
            codec = self._choose_codec(lane, gradient, self._gradient_codec, is_gradient=True)
            gradient = await self._encode(gradient, codec)
            until = form.end
            for block, row in reversed(piece.inputs):
                hidden = self._read_input(block, row, end - first)
                if block == form.start:  # the same bits as on the way forward
                    hidden = await self._encode(hidden, piece.codec)
                gradient = await self._backward(lane, piece, block, until, hidden, gradient)
                until = block
            await send(first, await self._plain(gradient))

        await self._run_lanes(run)
        return self._gradient_LE

    def close(self) -> None:
        """Forgets what was kept."""
        self._between.close()
        if self._own is not None:
            self._own.close()
            self._own = None

    def _cut(self, chains: Sequence[ChainShare]) -> None:
        form, config = self.form, self._model.config
        elements = 0
        if form.adapter is not None:
            elements = row_elements(config, form.adapter.form) * largest_hop(chains)
        cuts = cut_batch(
            form.sequences,
            form.tokens,
            hops=sum(len(chain.hops) for chain in chains),
            hidden_size=config.hidden_size,
            adapter_elements=elements if form.is_kept else 0,
        )
        for cut in cuts:
            mask = _rows_of_mask(form.mask, cut.first, cut.sequences)
            wire = PassPiece(sequences=cut.sequences, tokens=form.tokens, mask=mask)
            self._pieces.append(_Piece(cut.first, cut.sequences, wire))

    async def _run_lanes(self, run: Callable[[Lane, _Piece], Awaitable[None]]) -> None:
        """Has every piece run, in order, by whichever lane is free."""
        waiting = iter(self._pieces)

        async def work(lane: Lane, turns: Iterator[None]) -> None:
            for _, piece in zip(turns, waiting, strict=False):
                await run(lane, piece)
                self.counts.pieces += 1

        try:
            async with trio.open_nursery() as nursery:
                for lane in self._lanes:
                    turns = itertools.repeat(None, math.ceil(lane.share * len(self._pieces)))
                    window = self.form.pieces_under_way or PIECES_PER_HOP * len(lane.hops)
                    for _ in range(min(window, len(self._pieces))):
                        nursery.start_soon(work, lane, turns)
        except BaseExceptionGroup as group:
            raise_alone(group)

    async def _forward(
        self, lane: Lane, piece: _Piece, start: int, end: int, hidden: WireTensor
    ) -> tuple[WireTensor, list[tuple[int, WireTensor]]]:
        """Runs a piece through blocks; gives the output, and the input of each hop it crossed."""
        borders = []
        block = start
        while block < end:
            hop = lane.hops_between(block, end)[0]
            result = await self._try(
                lane, piece, hop, partial(self._ask_forward, piece, hop, hidden)
            )
            if result is not None:
                borders.append((block, hidden))
                hidden, block = result, hop.end
        return hidden, borders

    async def _backward(
        self,
        lane: Lane,
        piece: _Piece,
        start: int,
        end: int,
        hidden: WireTensor,
        gradient: WireTensor,
    ) -> WireTensor:
        """Takes a piece's gradient back through blocks whose input is known."""
        while True:
            hops = lane.hops_between(start, end)
            if len(hops) > 1:
                last = hops[-1].start
                between, borders = await self._forward(lane, piece, start, last, hidden)
                until = end
                for block, known in reversed([*borders, (last, between)]):
                    gradient = await self._backward(lane, piece, block, until, known, gradient)
                    until = block
                return gradient
            ask = partial(self._ask_backward, piece, hops[0], hidden, gradient)
            result = await self._try(lane, piece, hops[0], ask)
            if result is not None:
                given, of_adapter = result
                for part in of_adapter:
                    assert self._gradient_LE is not None
                    rows = slice(start - self.form.start, end - self.form.start)
                    self._gradient_LE[rows] += plain_tensor(part)
                return given

    async def _try(
        self, lane: Lane, piece: _Piece, hop: Hop, ask: Callable[[], Awaitable[R]]
    ) -> R | None:
        """Asks a hop; gives none where it failed, and others are in its place now."""
        generation = lane.generation
        for _ in range(2):
            try:
                result = await ask()
                lane.on_success(hop)
                return result
            except HopFailed as error:
                if error.reason == "stream_broken":  # perhaps of a link that it had given up
                    failure: HopFailed | BadAdapter = error
                    continue
                if error.reason == CODE_NOT_FINITE:
                    piece.not_finite_at.add(hop.peer)
                    if len(piece.not_finite_at) >= DISAGREEING_PEERS:
                        raise NotFinite(
                            f"{len(piece.not_finite_at)} servers give numbers that are not finite "
                            f"for blocks {hop.start}:{hop.end}; lower the learning rate, or look "
                            "at what is sent"
                        ) from error
                failure = error
            except BadAdapter as error:
                failure = error
            except RemoteProtocolError as error:
                failure = _blame(hop, error, None)
            break
        await lane.replace(hop, failure, generation)
        return None

    async def _ask_forward(self, piece: _Piece, hop: Hop, hidden: WireTensor) -> WireTensor:
        link = self._links.get(self._key(hop), hop.addresses)
        outputs = []
        for part, rows in await _fit(link, piece.wire):
            asked = slice_rows(hidden, rows)
            result = await link.run_forward(part, asked, self.form.adapter)
            await self._check(hop, asked, result.hidden, self._codec)
            self.counts.add(result.time)
            outputs.append(result.hidden)
        return await self._join(outputs)

    async def _ask_backward(
        self, piece: _Piece, hop: Hop, hidden: WireTensor, gradient: WireTensor
    ) -> tuple[WireTensor, list[WireTensor]]:
        """The input's gradient, and the adapter's, in parts that add up to it."""
        adapter = self.form.adapter
        link = self._links.get(self._key(hop), hop.addresses)
        gradients, of_adapter = [], []
        for part, rows in await _fit(link, piece.wire):
            asked = slice_rows(hidden, rows)
            result = await link.run_backward(part, asked, slice_rows(gradient, rows), adapter)
            await self._check(hop, asked, result.gradient, self._gradient_codec)
            if adapter is not None:
                of_adapter.append(_check_adapter(hop, adapter, result.adapter_gradient))
            self.counts.add(result.time)
            gradients.append(result.gradient)
        return await self._join(gradients), of_adapter

    def _key(self, hop: Hop) -> LinkKey:
        return LinkKey(
            model=self._model.fingerprint,
            peer=hop.peer,
            start=hop.start,
            end=hop.end,
            codec=self._codec,
            gradient_codec=self._gradient_codec,
            hosted=self.form.hosted,
        )

    async def _check(self, hop: Hop, asked: WireTensor, got: WireTensor, codec: str) -> None:
        rows = asked.shape[0]
        try:
            if not may_come_as(got.codec, codec):
                raise RemoteProtocolError(f"{got.codec[:32]!r} came for {codec}")
            if got.shape != asked.shape:
                raise RemoteProtocolError(f"{list(got.shape)} came for {list(asked.shape)}")
            await off_loop(_check_rows, got, self._hidden_size, rows, size_bytes=len(got.data))
        except RemoteProtocolError as error:
            raise _blame(hop, error, got) from error

    @property
    def _hidden_size(self) -> int:
        return self._model.config.hidden_size

    async def _read_own(self, history: InputHistory, first: int, end: int) -> WireTensor:
        """The app's own rows, checked."""
        rows = history.read(first, end)
        try:
            await off_loop(
                _check_rows, rows, self._hidden_size, end - first, size_bytes=len(rows.data)
            )
        except RemoteProtocolError as error:
            raise BadRequest(f"rows {first}:{end} cannot be run: {error}") from error
        return rows

    def _read_input(self, block: int, row: int, rows: int) -> WireTensor:
        history = self._own if block == self.form.start else self._between
        assert history is not None, "the pass was closed"
        return history.read(row, row + rows)

    def _choose_codec(
        self, lane: Lane, rows: WireTensor, asked: str, *, is_gradient: bool = False
    ) -> str:
        to = [hop.peer for hop in lane.hops[:1]]
        return self._codecs.choose(plain_tensor(rows), asked, to=to, is_gradient=is_gradient)

    async def _encode(self, rows: WireTensor, codec: str) -> WireTensor:
        """The app's own rows as they go to a hop.

        Raises:
            BadRequest: the codec cannot write them.
        """
        if codec == RAW:
            return rows
        try:
            return await off_loop(to_wire, plain_tensor(rows), codec, size_bytes=len(rows.data))
        except KernelError as error:
            raise BadRequest(f"rows cannot be sent as {codec}: {error}") from error

    async def _join(self, parts: Sequence[WireTensor]) -> WireTensor:
        """Rows of one hop, one after the other, in whichever codecs it chose for them."""
        if len({part.codec for part in parts}) > 1:
            parts = [await self._plain(part) for part in parts]
        return join_rows(parts)

    async def _plain(self, rows: WireTensor) -> WireTensor:
        if rows.codec == RAW:
            return rows
        return await off_loop(_decode_rows, rows, size_bytes=4 * rows.shape[0] * rows.shape[1])


async def _fit(link: PassLink, piece: PassPiece) -> list[tuple[PassPiece, slice]]:
    """A piece in parts that a server takes at once, with their rows; mostly it is one.

    Raises:
        HopFailed: the server cannot be used, or one sequence is too long for it.
    """
    await link.wait_open()
    most = link.max_tokens // piece.tokens
    if most >= piece.sequences:
        return [(piece, slice(0, piece.sequences * piece.tokens))]
    if not most:
        raise HopFailed(
            f"{link.key.peer} takes sequences of at most {link.max_tokens} tokens; "
            f"{piece.tokens} were to be run. Cut the texts shorter",
            peer=link.key.peer,
            reason=CODE_SEQUENCE_TOO_LONG,
        )
    parts = []
    for first in range(0, piece.sequences, most):
        count = min(most, piece.sequences - first)
        mask = _rows_of_mask(piece.mask, first, count)
        part = PassPiece(sequences=count, tokens=piece.tokens, mask=mask)
        parts.append((part, slice(first * piece.tokens, (first + count) * piece.tokens)))
    return parts


def _check_adapter(hop: Hop, adapter: LentAdapter, got: WireTensor | None) -> WireTensor:
    expected = (hop.end - hop.start, adapter.values_LE.shape[1])
    is_numbers = False
    try:
        if got is None or got.shape != expected:
            shape = None if got is None else list(got.shape)
            raise RemoteProtocolError(
                f"an adapter's gradient of the shape {shape} came for {list(expected)}"
            )
        values_LE = plain_tensor(got)
        is_numbers = True
        if not all_finite(values_LE):
            raise RemoteProtocolError("an adapter's gradient came that is not finite")
    except RemoteProtocolError as error:
        raise _blame(hop, error, got if is_numbers else None) from error
    return got


def _check_rows(rows: WireTensor, hidden_size: int, max_tokens: int) -> None:
    check_rows(rows, hidden_size=hidden_size, max_tokens=max_tokens)


def _decode_rows(rows: WireTensor) -> WireTensor:
    dtype = getattr(torch, rows.dtype)
    count, width = rows.shape
    decoded = from_wire(
        rows, hidden_size=width, max_tokens=count, dtype=dtype, device=torch.device("cpu")
    )
    return to_wire(decoded)


def _blame(hop: Hop, error: RemoteProtocolError, got: WireTensor | None) -> HopFailed:
    is_numbers = got is not None and "finite" in str(error)
    reason = CODE_NOT_FINITE if is_numbers else error.code
    return HopFailed(f"{hop.peer} sent what cannot be: {error}", peer=hop.peer, reason=reason)


def _rows_of_mask(mask: WireTensor | None, first: int, sequences: int) -> WireTensor | None:
    """A piece's part of a mask; none where it has no padding."""
    if mask is None:
        return None
    tokens = mask.shape[1]
    data = memoryview(mask.data)[first * tokens : (first + sequences) * tokens]
    if all(data):
        return None
    return WireTensor(mask.dtype, (sequences, tokens), data, mask.codec)
