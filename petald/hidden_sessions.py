"""Sessions for hidden states, for apps that do embedding and sampling themselves.

They belong to the connection that opened them, and go with it. Invariant: one step at a time of a
session is under way, so that steps are done in the order in which the app hears of their ends.

Shapes: S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import torch
import trio

from p2p.errors import RemoteProtocolError
from p2p.wire.control_messages import ChainHop
from p2p.wire.message import Message
from p2p.wire.tensor import RAW, WireTensor
from p2p.wire.training_messages import (
    HiddenOpened,
    HiddenStepDone,
    OpenHiddenSession,
    RunHiddenStep,
)
from petald.chain_client import ChainSession
from petald.errors import BadRequest, HopFailed
from petald.job_adapter import check_lent
from petald.lent_adapter import LentAdapter
from petald.local_model import LocalModels, ModelIdentity
from petald.router import Router
from petald.session_actions import StepResultRows
from petald.step_pieces import run_pieces
from petald.tensors import WIRE_DTYPES, from_wire, off_loop, to_wire

MAX_SESSIONS = 64
"""For a connection: one for each sequence of a batch that is generated at once."""

CPU = torch.device("cpu")

Send = Callable[[Message], Awaitable[None]]
HiddenRequest = OpenHiddenSession | RunHiddenStep


@dataclass(eq=False, slots=True)
class _Open:
    """A session, or its place while it is being opened."""

    model: ModelIdentity | None = None
    session: ChainSession | None = None
    is_in_use: bool = True


@dataclass(eq=False, slots=True)
class HiddenState:
    """One connection's sessions, by the app's names for them."""

    sessions: dict[str, _Open] = field(default_factory=dict)

    async def close(self, name: str) -> None:
        """Ends a session on every hop, if there is one of this name."""
        opened = self.sessions.pop(name, None)
        if opened is not None and opened.session is not None:
            await opened.session.close()


class HiddenSessions:
    """Opens the sessions and runs their steps; one for all connections of a daemon.

    Args:
        models: that can be named.
        router: opens sessions.
        max_wait_s: how long to wait where nobody can run some blocks, by default.
    """

    def __init__(self, models: LocalModels, router: Router, *, max_wait_s: float) -> None:
        self._models = models
        self._router = router
        self._max_wait_s = max_wait_s

    async def run(
        self,
        request: HiddenRequest,
        state: HiddenState,
        send: Send,
        *,
        nursery: trio.Nursery,
        adapters: Mapping[int, LentAdapter],
    ) -> None:
        """Does one job, and tells its end.

        Args:
            request: the job.
            state: of the connection.
            send: takes what the app is to be told.
            nursery: of the connection; holds the tasks of sessions.
            adapters: that the connection has put, by their numbers.

        Raises:
            PetaldError, KernelError: it could not be done.
        """
        if isinstance(request, OpenHiddenSession):
            await send(await self._open(request, state, nursery, adapters))
        else:
            await send(await _run_step(request, state))

    async def _open(
        self,
        request: OpenHiddenSession,
        state: HiddenState,
        nursery: trio.Nursery,
        adapters: Mapping[int, LentAdapter],
    ) -> HiddenOpened:
        name = request.session
        if name in state.sessions:
            raise BadRequest(f"a session {name!r} is open already; close it, or choose a new name")
        if len(state.sessions) >= MAX_SESSIONS:
            raise BadRequest(f"this connection has {MAX_SESSIONS} sessions; close one first")
        if request.max_tokens < 1:
            raise BadRequest("a session needs room for at least one token")
        opened = state.sessions[name] = _Open()
        try:
            model = opened.model = await self._models.identify(request.model)
            opened.session = await self._router.open_session(
                model,
                max_tokens=request.max_tokens,
                nursery=nursery,
                max_wait_s=self._max_wait_s if request.max_wait_s is None else request.max_wait_s,
                adapter=_find_adapter(request, model, adapters),
                hosted=request.hosted,
            )
        finally:
            opened.is_in_use = False
            if state.sessions.get(name) is not opened:  # it was closed meanwhile
                if opened.session is not None:
                    await opened.session.close()
            elif opened.session is None:
                del state.sessions[name]
        chain = tuple(
            ChainHop(peer=hop.peer, start=hop.start, end=hop.end) for hop in opened.session.chain
        )
        return HiddenOpened(job=request.job, chain=chain)


async def _run_step(request: RunHiddenStep, state: HiddenState) -> HiddenStepDone:
    opened = state.sessions.get(request.session)
    if opened is not None and opened.is_in_use:
        raise BadRequest(f"the session {request.session!r} has a job running; wait for its end")
    if opened is None or opened.session is None or opened.model is None:
        raise BadRequest(f"no session {request.session!r} is open on this connection")
    session, hidden_size = opened.session, opened.model.config.hidden_size
    size_bytes = len(request.hidden.data)
    opened.is_in_use = True
    try:
        rows_SD = await off_loop(_read_rows, request.hidden, hidden_size, size_bytes=size_bytes)

        async def make_piece(start: int, end: int) -> WireTensor:
            rows = slice(start - request.position, end - request.position)
            return await session.encode(rows_SD[rows])

        results = await run_pieces(
            session,
            request.position,
            request.position + rows_SD.shape[0],
            make_piece,
            is_last_wanted=request.is_last_wanted,
        )
        peer = session.chain[-1].peer if session.chain else ""
        output_SD = await off_loop(
            _join, results, hidden_size, peer, request.hidden.dtype, size_bytes=size_bytes
        )
    finally:
        opened.is_in_use = False
        if not session.is_open and state.sessions.get(request.session) is opened:
            del state.sessions[request.session]
    return HiddenStepDone(job=request.job, hidden=to_wire(output_SD))


def _find_adapter(
    request: OpenHiddenSession, model: ModelIdentity, adapters: Mapping[int, LentAdapter]
) -> LentAdapter | None:
    if request.adapter is None:
        return None
    adapter = adapters.get(request.adapter)
    if adapter is None:
        raise BadRequest(f"no adapter {request.adapter} was put on this connection")
    check_lent(adapter, model)
    return adapter


def _read_rows(hidden: WireTensor, hidden_size: int) -> torch.Tensor:
    """What the app sent, in the dtype in which it goes to the first hop."""
    if hidden.codec != RAW or hidden.dtype not in WIRE_DTYPES:
        raise BadRequest("hidden states are to come uncompressed, as floats")
    dtype = WIRE_DTYPES[hidden.dtype]
    if dtype is torch.float64:  # no hop takes it
        dtype = torch.float32
    count = hidden.shape[0] if hidden.shape else 0
    try:
        return from_wire(
            hidden, hidden_size=hidden_size, max_tokens=max(count, 1), dtype=dtype, device=CPU
        )
    except RemoteProtocolError as error:
        raise BadRequest(f"a step cannot be run: {error}") from error


def _join(
    results: list[StepResultRows], hidden_size: int, peer: str, dtype_name: str
) -> torch.Tensor:
    """The output's rows, in the dtype that the app uses."""
    parts = [result.hidden for result in results if result.hidden is not None]
    if not parts:
        raise HopFailed("the last hop sent no hidden states where some were wanted", peer=peer)
    dtype = WIRE_DTYPES[dtype_name]
    return torch.cat(
        [
            from_wire(
                part,
                hidden_size=hidden_size,
                max_tokens=part.shape[0],
                dtype=dtype,
                device=CPU,
            )
            for part in parts
        ]
    )
